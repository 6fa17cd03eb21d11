"""Publishing, promotion and rollback in a real MLflow store, and what an interruption leaves."""

import shutil
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from mlflow.utils.file_utils import local_file_uri_to_path

from recsys_dist.bundle import Bundle
from recsys_dist.errors import BundleError, RegistryError
from recsys_dist.gates import GateConfig
from recsys_dist.manifest import Manifest
from recsys_dist.registry import CHALLENGER, CHAMPION, Registry, RegistryConfig
from tests.test_tracking import Server


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables: making them takes seconds, copying does not."""
    place = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{place}").search_experiments()
    return place


@pytest.fixture
def registry(store: Path, tmp_path: Path) -> Registry:
    shutil.copyfile(store, tmp_path / "mlflow.db")
    return Registry(RegistryConfig(uri=f"sqlite:///{tmp_path / 'mlflow.db'}"))


@pytest.fixture(scope="module")
def variants(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three bundles that differ in content; AUC .80, .85 and .70, popularity's .60."""
    root, made = tmp_path_factory.mktemp("variants"), []
    for number, auc in enumerate((0.80, 0.85, 0.70)):
        values = bundle.manifest.model_dump()
        values["metrics"]["ranking"]["model"]["auc"] = auc
        values["metrics"]["ranking"]["popularity"]["auc"] = 0.6
        for scorer, recall in (("model", 0.5), ("popularity", 0.4)):
            values["metrics"]["recall"][scorer]["recall@100"] = recall
        positives = bundle.positives.copy()
        positives[1] += number
        made.append(replace(bundle, manifest=Manifest.parse(values), positives=positives).save(root).path)
    assert len({path.name for path in made}) == 3
    return made


def champion(registry: Registry) -> str:
    return registry.current(CHAMPION)


def test_better_becomes_champion_worse_a_challenger(registry: Registry, variants: list[Path]) -> None:
    fair, good, bad = variants
    first = registry.publish(fair)
    assert (first.entry.number, first.entry.bundle, first.entry.aliases) == ("1", fair.name, (CHAMPION,))
    assert registry.publish(good).entry.aliases == (CHAMPION,)
    refused = registry.publish(bad)
    assert refused.entry.aliases == (CHALLENGER,)
    assert [gate.name for gate in refused.gates if not gate.passed] == [
        f"ranking auc against champion {good.name}"
    ]
    assert champion(registry) == good.name
    assert "FAILED  ranking auc against champion" in refused.entry.gates
    newest, _, oldest = registry.entries()
    assert (newest.bundle, newest.aliases, oldest.aliases) == (bad.name, (CHALLENGER,), ())
    same = registry.publish(good)  # again: nothing happens
    assert same.entry.number == "2" and len(registry.entries()) == 3


def test_the_figures_stand_at_the_model(registry: Registry, variants: list[Path]) -> None:
    registry.publish(variants[0])
    client = registry._client
    version = client.get_model_version_by_alias("recsys_dist", CHAMPION)
    [model] = client.search_logged_models(["1"])
    told = {metric.key: metric.value for metric in model.metrics}
    assert told["test/ranking/model/auc"] == 0.80 and told["index/recall_at_200"] == 1
    assert "test/recall/popularity/recall_at_100" in told
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED" and run.data.params["bundle"] == variants[0].name


def test_promote_and_roll_back_in_order(registry: Registry, variants: list[Path]) -> None:
    fair, good, bad = variants
    for path in variants:
        registry.publish(path)
    assert registry.promote(CHALLENGER).aliases == (CHAMPION,)
    assert champion(registry) == bad.name
    with pytest.raises(RegistryError, match="has no version or alias 'challenger'; it has: "):
        registry.current(CHALLENGER)
    assert registry.rollback().bundle == good.name
    assert registry.rollback().bundle == fair.name
    with pytest.raises(RegistryError, match="has had no champion before the present one"):
        registry.rollback()
    assert registry.promote("3").bundle == bad.name
    assert registry.promote(good.name).number == "2"
    assert registry.rollback().bundle == bad.name


@pytest.mark.parametrize(
    "call", ["log_model_artifacts", "create_model_version", "set_registered_model_alias"]
)
def test_interrupted_anywhere_the_old_champion_stands(
    registry: Registry, variants: list[Path], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Stopped right before `call`, as by Ctrl-C; then the same command again goes through."""
    fair, good, _ = variants
    registry.publish(fair)
    with monkeypatch.context() as patch:
        patch.setattr(registry._client, call, interrupt)
        with pytest.raises(KeyboardInterrupt):
            registry.publish(good)
    assert champion(registry) == fair.name
    with pytest.raises(RegistryError, match="no champion before"):
        registry.rollback()
    assert registry.publish(good).entry.aliases == (CHAMPION,)
    assert registry.rollback().bundle == fair.name


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


def test_rollback_interrupted_is_done_or_not(
    registry: Registry, variants: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in (*variants[:2], variants[2]):
        registry.publish(path)
    registry.promote("3")
    with monkeypatch.context() as patch:
        patch.setattr(registry._client, "set_registered_model_tag", interrupt)
        with pytest.raises(KeyboardInterrupt):
            registry.rollback()
    assert champion(registry) == variants[1].name
    assert registry.rollback().bundle == variants[0].name


def test_a_damaged_upload_is_never_registered(
    registry: Registry, variants: list[Path], tmp_path: Path
) -> None:
    upload = registry._client.log_model_artifacts

    def torn(model_id: str, directory: str) -> None:
        copy = Path(shutil.copytree(directory, tmp_path / "copy"))
        (copy / "seen.parquet").write_bytes(b"")
        upload(model_id, str(copy))

    registry._client.log_model_artifacts = torn
    with pytest.raises(BundleError, match=r"seen\.parquet has 0 bytes instead of"):
        registry.publish(variants[0])
    assert registry.entries() == []
    [run] = registry._client.search_runs(["1"])
    assert run.info.status == "FAILED"
    damaged = Path(shutil.copytree(variants[0], tmp_path / "damaged"))
    (damaged / "users.parquet").unlink()
    with pytest.raises(BundleError, match=r"users\.parquet is missing"):
        registry.publish(damaged)


@pytest.mark.parametrize("harm", ["gone", "damaged"])
def test_what_is_no_longer_whole_in_the_registry_is_uploaded_anew(
    registry: Registry, variants: list[Path], tmp_path: Path, harm: str
) -> None:
    fair, good, _ = variants
    registry.publish(fair)
    registry.publish(good)
    source = registry._client.get_model_version_by_alias("recsys_dist", CHAMPION).source
    stored = local_file_uri_to_path(source)
    if harm == "gone":
        shutil.rmtree(stored)
    else:
        Path(stored, "users.parquet").write_bytes(b"")
    again = registry.publish(good).entry
    assert (again.number, again.aliases) == ("3", (CHAMPION,))
    assert registry.resolve(CHAMPION, tmp_path / "cache").name == good.name
    assert registry.publish(good).entry.number == "3", "and once only"
    assert registry.rollback().bundle == fair.name


def test_what_is_damaged_in_the_registry_becomes_no_champion(
    registry: Registry, variants: list[Path]
) -> None:
    fair, good, _ = variants
    registry.publish(fair)
    source = registry._client.get_model_version_by_alias("recsys_dist", CHAMPION).source
    registry.publish(good)
    Path(local_file_uri_to_path(source), "users.parquet").write_bytes(b"")
    for make_champion in (registry.rollback, lambda: registry.promote("1")):
        with pytest.raises(RegistryError, match=r"version 1 is not whole in the registry: .*users\.parquet"):
            make_champion()
    assert champion(registry) == good.name


def test_a_champion_whose_files_are_all_gone_is_no_dead_registry(
    registry: Registry, variants: list[Path], tmp_path: Path
) -> None:
    """Which would be asked again for ever, and the former champion be taken for this one."""
    registry.publish(variants[0])
    registry.resolve(CHAMPION, tmp_path / "cache")
    registry.publish(variants[1])
    source = registry._client.get_model_version_by_alias("recsys_dist", CHAMPION).source
    shutil.rmtree(local_file_uri_to_path(source))
    with pytest.raises(BundleError, match=f"all files of bundle {variants[1].name} are gone"):
        registry.resolve(CHAMPION, tmp_path / "cache")


def test_other_golden_answers_are_uploaded_and_fetched_anew(
    registry: Registry, variants: list[Path], tmp_path: Path
) -> None:
    """As a newer program gives them: they are no part of a bundle's version."""
    bundle, cache = Bundle.open(variants[0]), tmp_path / "cache"
    for number, answer in enumerate(("former", "newer"), start=1):
        made = bundle.save(tmp_path / answer, lambda _, a=answer: [{"answer": a}]).path
        for _ in range(2):
            assert registry.publish(made).entry.number == str(number)
        found = registry.resolve(CHAMPION, cache)
        assert found == cache / bundle.manifest.version
        assert Bundle.open(found).golden == [{"answer": answer}]
    source = registry._client.get_model_version_by_alias("recsys_dist", CHAMPION).source
    shutil.rmtree(local_file_uri_to_path(source))
    assert registry.resolve(CHAMPION, cache) == found, "a copy that is whole outlives the registry's"


def test_a_champion_of_other_days_is_measured_anew(
    registry: Registry, variants: list[Path], bundle: Bundle, tmp_path: Path
) -> None:
    fair, good, _ = variants
    registry.publish(fair)
    values = Bundle.open(good).manifest.model_dump()
    values["data"]["data_digest"] = "of the next day"
    positives = bundle.positives + 7
    later = replace(bundle, manifest=Manifest.parse(values), positives=positives).save(tmp_path / "b").path
    assert registry.publish(later).entry.aliases == (CHALLENGER,)
    asked = []

    def measure(path: Path) -> dict[str, dict[str, dict[str, float]]]:
        asked.append(Bundle.open(path).manifest.version)
        return {"ranking": {"model": {"auc": 0.84}}, "recall": {"model": {"recall@100": 0.5}}}

    assert registry.publish(later, GateConfig(tolerance=0), measure).entry.aliases == (CHAMPION,)
    assert asked == [fair.name]


def test_resolve_fetches_once_and_repairs(registry: Registry, variants: list[Path], tmp_path: Path) -> None:
    fair, good, _ = variants
    registry.publish(fair)
    cache = tmp_path / "cache"
    found = registry.resolve(CHAMPION, cache)
    assert found == cache / fair.name and Bundle.open(found).manifest.version == fair.name
    before = (found / "manifest.json").stat().st_ino
    assert registry.resolve("1", cache) == found and (found / "manifest.json").stat().st_ino == before
    (found / "items.parquet").write_bytes(b"damaged")
    Bundle.open(registry.resolve(CHAMPION, cache))
    registry.publish(good)
    assert registry.resolve(CHAMPION, cache).name == good.name


@pytest.fixture
def dead() -> Iterator[Registry]:
    with socket.socket() as unused:  # bound and not listening: connections are refused
        unused.bind(("127.0.0.1", 0))
        yield Registry(RegistryConfig(uri=f"http://127.0.0.1:{unused.getsockname()[1]}", request_timeout_s=2))


def test_a_dead_registry_is_named_and_the_last_champion_served(
    registry: Registry, dead: Registry, variants: list[Path], tmp_path: Path
) -> None:
    for ask in (dead.entries, dead.rollback, dead.current, lambda: dead.publish(variants[0])):
        with pytest.raises(RegistryError, match=r"the registry at http://127.0.0.1:\d+ failed"):
            ask()
    with pytest.raises(RegistryError, match="failed"):
        dead.resolve(CHAMPION, tmp_path / "cache")
    registry.publish(variants[0])
    registry.resolve(CHAMPION, tmp_path / "cache")
    assert dead.resolve(CHAMPION, tmp_path / "cache").name == variants[0].name


def test_a_registry_that_is_not_there_is_not_made_by_asking(tmp_path: Path) -> None:
    registry = Registry(RegistryConfig(uri=f"sqlite:///{tmp_path / 'none.db'}"))
    with pytest.raises(RegistryError, match=r"there is no registry .*none\.db"):
        registry.current()
    assert list(tmp_path.iterdir()) == []


def test_a_version_that_is_no_bundle_touches_no_directory(registry: Registry, tmp_path: Path) -> None:
    registry._client.create_registered_model("recsys_dist")
    for tags in ({"bundle": "../precious"}, {}):
        registry._client.create_model_version("recsys_dist", source="s3://elsewhere", tags=tags)
    precious = tmp_path / "precious"
    precious.mkdir()
    for number in ("1", "2"):
        with pytest.raises(RegistryError, match="holds no bundle"):
            registry.resolve(number, tmp_path / "cache")
    assert precious.is_dir()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    server.kill()


@pytest.mark.e2e
def test_a_server_takes_bundles_and_gives_them_back(
    started: Server, variants: list[Path], tmp_path: Path
) -> None:
    registry = Registry(RegistryConfig(uri=started.uri))
    for path in variants[:2]:
        assert registry.publish(path).entry.aliases == (CHAMPION,)
    assert Bundle.open(registry.resolve(CHAMPION, tmp_path / "cache")).manifest.version == variants[1].name
    assert registry.rollback().bundle == variants[0].name
    assert [entry.number for entry in registry.entries()] == ["2", "1"]
    for stored in list((tmp_path / "artifacts").rglob("manifest.json")):
        shutil.rmtree(stored.parent)
    with pytest.raises(BundleError, match="are gone from the registry"):
        registry.resolve(CHAMPION, tmp_path / "other cache")
    started.kill()
    with pytest.raises(RegistryError, match=r"failed: .*(refused|reset)"):
        registry.current()
    assert registry.resolve(CHAMPION, tmp_path / "cache").name == variants[1].name, "as it was last"
