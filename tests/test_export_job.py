"""`jobs.export` as a user runs it: finds the pair, registers it, promotes, rolls back, explains."""

import json
import shutil
from pathlib import Path

import pytest

from jobs import export as job
from jobs.command import reported
from recsys_dist.bundle import Bundle
from recsys_dist.data.prepared import Prepared
from recsys_dist.registry import CHAMPION
from tests import bundles
from tests.conftest import Pair
from tests.data import small_log

FEW = ("evaluate.bootstrap=2", "evaluate.item_pairs=0")  # the latter needs no Ray


def lay_out(run: Path, prepared: Prepared, checkpoints: dict[str, Path]) -> Path:
    """The directory that `jobs.quickstart` leaves."""
    shutil.copytree(prepared.path, run / "data")
    for task, checkpoint in checkpoints.items():
        models = run / f"models/{task}-{bundles.MODELS[task]['name']}-0123"
        shutil.copytree(checkpoint, models / "refit" / checkpoint.name)
        (models / "result.json").write_text(json.dumps({"checkpoint": f"refit/{checkpoint.name}"}))
    return run


@pytest.fixture(scope="module")
def run(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("run"), pair.prepared, pair.checkpoints)


def test_from_a_run_to_the_champion_and_back(
    run: Path, bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: str) -> str:
        assert reported(job.main, ["--run", str(run), *arguments]) == 0
        return capsys.readouterr().out

    version = bundle.manifest.version
    first = said(*FEW)  # the tiny models learn from chance: popularity may well be better
    assert f"bundle {version}: {run / 'bundles' / version}" in first and "against popularity" in first
    assert said("--promote", version) == f"version 1 (bundle {version}) is @{CHAMPION}\n"
    assert f"1  {version}" in (listed := said("--list")) and f"@{CHAMPION}" in listed
    assert "gates:" not in said(*FEW), "it is champion already"

    later = bundles.prepare(tmp_path / "later", small_log.events(seed=1))
    second = lay_out(tmp_path / "run", later, bundles.train(later, tmp_path / "models"))
    uri = f"sqlite:///{run / 'mlflow.db'}"
    found = said(*FEW, "--run", str(second), "--tracking-uri", uri)
    assert "registered as version 2" in found and f"against champion {version}: 0." in found
    assert said("--promote", "2").endswith(f"is @{CHAMPION}\n")
    assert said("--rollback") == f"version 1 (bundle {version}) is @{CHAMPION}\n"


def test_a_pair_that_is_named_and_no_registry(
    run: Path, pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recall = next((run / "models").glob("recall-*"))
    named = ["--recall", str(recall), "--ranking", str(next(recall.parent.glob("ranking-*/refit/*")))]
    data = ["--data", str(pair.prepared.path), "--out", str(tmp_path)]
    assert reported(job.main, [*named, *data, "--no-register", *FEW]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["bundles"]
    [path] = (tmp_path / "bundles").glob("[!.]*")
    assert f"python -m jobs.serve --bundle {path}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["gates.tolerence=1"], "did you mean 'tolerance'"),
        (["--recall", "nowhere"], "'nowhere' is neither a finished run (no result.json) nor a checkpoint"),
        (["--rollback"], "there is no registry"),
        (["--promote", "3"], "there is no registry"),
        (["--promote", ""], "there is no registry"),
        (["--promote", "3", "--tracking-uri", "localhost:5000"], "starts with one of sqlite, http"),
    ],
)
def test_mistakes_are_explained(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    lay_out(tmp_path / "run", pair.prepared, {})
    assert reported(job.main, ["--run", str(tmp_path / "run"), *arguments]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("result.json", None, "no-such-step', without manifest.json; train anew"),
        ("result.json", '{"checkp', "result.json' has no checkpoint that can be read: JSONDecodeError"),
        ("result.json", "{}", "result.json' has no checkpoint that can be read: KeyError"),
        ("step/manifest.json", "[]", "manifest.json' has no data_digest that can be read: TypeError"),
    ],
)
def test_a_run_that_is_damaged_is_named(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, text: str | None, said: str
) -> None:
    lay_out(tmp_path, pair.prepared, {})
    run = tmp_path / "models/recall-mine"
    (run / "step").mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({"checkpoint": "step" if text else "no-such-step"}))
    if text:
        (run / file).write_text(text)
    assert reported(job.main, ["--run", str(tmp_path), "--no-register"]) == 2
    assert said in capsys.readouterr().err


def test_models_of_other_data_are_not_taken(
    pair: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = bundles.prepare(tmp_path / "later", small_log.events(seed=1))
    lay_out(tmp_path / "run", later, pair.checkpoints)
    assert reported(job.main, ["--run", str(tmp_path / "run"), "--no-register"]) == 2
    assert "holds 1 finished recall runs, none of them on the data in" in capsys.readouterr().err
