import logging
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

import recsys_dist.train.checkpoint as checkpoints
import recsys_dist.train.saving as saving
import recsys_dist.train.storage as storage
from recsys_dist.errors import CheckpointError, NonFiniteLossError
from recsys_dist.models import protocol
from recsys_dist.models.protocol import Catalogue
from recsys_dist.train.checkpoint import Manifest, latest_valid, load_for_inference, retain, verify
from recsys_dist.train.loop import Epoch, Workers, idle_batch
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.pieces import local
from recsys_dist.train.placement import ShardingConfig
from recsys_dist.train.sharding import shard
from tests.train import tiny
from tests.train.ranks import run_ranks
from tests.train.test_sharding import ADAGRAD, DECAY, FTRL, ROWWISE, build, local_batches
from tests.train.truth import SEED, train, whole


def manifest(epoch: int) -> Manifest:
    return Manifest(
        model={"name": "tiny"},
        data_schema=tiny.schema(),
        vocabulary_digest="v",
        data_digest="d",
        seed=SEED,
        phase="choose",
        epoch=epoch,
        step=5 * epoch,
        history=[{"auc": 0.5 + epoch / 10}],
    )


def sharded_model(kind: dict, optimizer=ROWWISE, seed: int = SEED + 1):
    loss = build()
    return shard(loss, loss.model.table_groups(), optimizer, ShardingConfig.parse(kind), seed)


def one_epoch(rank: int, world: int, sharded) -> None:
    rows = 24 // world
    epoch = Epoch(sharded.model, sharded.optimizers, idle_batch(tiny.schema(), rows), Workers())
    train(epoch, local_batches(rank, rows))


def state(sharded) -> dict[str, np.ndarray]:
    sums = {f"sums {name}": total for name, total in whole(sharded.accumulators()).items()}
    return {**whole(sharded.weights()), **sums}


def few_rows(rank: int, sharded, *key: int) -> None:
    """A step of the first worker's on two rows, the same for the same key."""
    mine = [tiny.batch_of(2, "few", *key)] if rank == 0 else []
    train(Epoch(sharded.model, sharded.optimizers, idle_batch(tiny.schema(), 24), Workers()), mine)


def train_and_save(rank: int, world: int, kind: dict, optimizer, root: str) -> dict[str, np.ndarray]:
    """A full checkpoint, one of what changed since, and on."""
    sharded, background = sharded_model(kind, optimizer), saving.Background(Workers())
    saving.watch(sharded, 1.0)
    one_epoch(rank, world, sharded)
    place = storage.root(root)
    saving.save(place, sharded, catalogue(), manifest(1), Workers())
    few_rows(rank, sharded, 1)
    background.save(place, sharded, catalogue(), manifest(2))
    background.wait()
    after_two = state(sharded)
    few_rows(rank, sharded, 2)
    after_three = state(sharded)
    one_epoch(rank, world, sharded)
    return {"two": after_two, "three": after_three, "four": state(sharded)}


def load_and_train(rank: int, world: int, kind: dict, optimizer, root: str) -> dict[str, np.ndarray]:
    sharded, background = sharded_model(kind, optimizer, SEED + 2), saving.Background(Workers())
    saving.watch(sharded, 1.0)
    place = storage.root(root)
    found = latest_valid(place)
    assert found is not None and found.manifest.base is not None
    checkpoints.load(found, sharded)
    restored = state(sharded)
    few_rows(rank, sharded, 2)
    background.save(place, sharded, catalogue(), found.manifest.model_copy(update={"epoch": 3}))
    background.wait()
    after_three = state(sharded)
    one_epoch(rank, world, sharded)
    return {"two": restored, "three": after_three, "four": state(sharded)}


def catalogue() -> Catalogue:
    return Catalogue(torch.arange(tiny.ROWS["item"]))


HALF = OptimizerConfig.parse({"deep": {**ROWWISE.deep.model_dump(), "precision": "fp16"}})
DATA_PARALLEL = {"tables": {"user": "data_parallel", "item": "data_parallel"}}
WIDE_DATA_PARALLEL = {"tables": {"wide_item": "data_parallel"}}
COLUMN_WISE = {"tables": {"user": "column_wise", "step": "column_wise"}}


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("optimizer", "first", "then"),
    [
        (ROWWISE, (2, {"kind": "table_wise"}), (1, {})),
        (ROWWISE, (1, {}), (3, {"kind": "row_wise"})),
        (ROWWISE, (3, {"kind": "row_wise"}), (2, DATA_PARALLEL)),
        (ROWWISE, (2, DATA_PARALLEL), (2, {"kind": "table_wise"})),
        (HALF, (2, {"kind": "table_wise"}), (3, {"kind": "row_wise"})),
        (ADAGRAD, (2, COLUMN_WISE), (3, {"kind": "row_wise"})),
        (ADAGRAD, (2, {"kind": "row_wise"}), (2, COLUMN_WISE)),
        pytest.param(FTRL, (2, {"kind": "row_wise"}), (3, {"kind": "table_wise"}), id="fsspec"),
        (DECAY, (3, {"kind": "row_wise"}), (2, DATA_PARALLEL)),
        (FTRL, (3, {"kind": "table_wise"}), (2, WIDE_DATA_PARALLEL)),
        (FTRL, (1, WIDE_DATA_PARALLEL), (2, {"kind": "row_wise"})),
    ],
)
def test_training_goes_on_at_another_worker_count_and_sharding(tmp_path, request, optimizer, first, then):
    """From a checkpoint of a few changed rows, which are then some more, of the same full one."""
    root = f"file://{tmp_path}" if "fsspec" in request.node.name else str(tmp_path)
    uninterrupted = run_ranks(first[0], train_and_save, *first, optimizer, root)[0]
    for resumed in run_ranks(then[0], load_and_train, *then, optimizer, root):
        for name, value in uninterrupted["two"].items():
            np.testing.assert_array_equal(resumed["two"][name], value, err_msg=name)
        rtol = 1e-3 if optimizer.deep.precision else 1e-7  # which of two neighbours a sum is rounded to
        for name, value in uninterrupted["three"].items():
            np.testing.assert_allclose(resumed["three"][name], value, rtol, atol=2e-5, err_msg=name)
        for name, value in uninterrupted["four"].items():
            np.testing.assert_allclose(resumed["four"][name], value, rtol, atol=2e-5, err_msg=name)
    full, one, another = (next(tmp_path.glob(f"epoch-000{number}-*")) for number in (1, 2, 3))
    assert verify(one).base == verify(another).base == checkpoints.Checkpoint(full, verify(full)).as_base()
    expected = {k: torch.from_numpy(v) for k, v in resumed["three"].items() if not k.startswith("sums ")}
    found = {f"weights.{name}": torch.full_like(value, torch.nan) for name, value in expected.items()}
    checkpoints.read(another, found)
    for name, value in expected.items():
        torch.testing.assert_close(found[f"weights.{name}"], value, rtol=0, atol=0, msg=name)


def bytes_of_tables(_rank: int, root: str, optimizer) -> dict[str, int]:
    sharded = sharded_model({}, optimizer)
    saved = saving.save(Path(root), sharded, catalogue(), manifest(1), Workers())
    weights = sharded.weights()
    sizes = {name: tensor.nbytes for name in sharded.tables for tensor, _ in local(weights[name])}
    return {**sizes, "files": sum(file.stat().st_size for file in saved.path.glob("*.distcp"))}


@pytest.mark.ranks
def test_tables_of_fp16_take_half_of_the_bytes_and_are_read_as_floats(tmp_path, monkeypatch):
    for module in (checkpoints, protocol):
        monkeypatch.setattr(module, "model_module", lambda _: tiny)
    roots = {name: tmp_path / name for name in ("full", "half")}
    full = run_ranks(1, bytes_of_tables, str(roots["full"]), ROWWISE)[0]
    half = run_ranks(1, bytes_of_tables, str(roots["half"]), HALF)[0]
    deep = [name for name in half if name.endswith("weight") and "wide" not in name]
    assert len(deep) == 3 and [half[name] * 2 for name in deep] == [full[name] for name in deep]
    assert full["files"] - half["files"] > 0.9 * sum(half[name] for name in deep)
    floats, read = (load_for_inference(*root.iterdir())[0].state_dict() for root in roots.values())
    for name, weight in floats.items():
        expected = weight.half().float() if f"model.{name}" in deep else weight
        torch.testing.assert_close(read[name], expected, rtol=0, atol=0)


def save_behind(rank: int, root: str) -> dict[str, dict[str, np.ndarray]]:
    """Trains on while it is being written; another one waits for that."""
    sharded, workers = sharded_model({"tables": {"user": "row_wise", "item": "data_parallel"}}), Workers()
    background, kept = saving.Background(workers), []
    one_epoch(rank, 2, sharded)
    background.save(Path(root), sharded, catalogue(), manifest(1), then=lambda saved: kept.append(saved.path))
    at_one = state(sharded)
    one_epoch(rank, 2, sharded)
    background.save(Path(root), sharded, catalogue(), manifest(2), then=lambda saved: kept.append(saved.path))
    assert [path.name[:10] for path in kept] == ["epoch-0001"] and verify(kept[0]).workers == 2
    at_two = state(sharded)
    one_epoch(rank, 2, sharded)
    background.wait()
    return {"1": at_one, "2": at_two}


def load_numbered(_rank: int, root: str, number: str) -> dict[str, np.ndarray]:
    sharded = sharded_model({})
    [path] = Path(root).glob(f"epoch-000{number}-*")
    checkpoints.load(checkpoints.Checkpoint(path, verify(path)), sharded)
    return state(sharded)


@pytest.mark.ranks
def test_what_is_saved_behind_training_is_what_there_was_when_it_began(tmp_path):
    found = run_ranks(2, save_behind, str(tmp_path))[0]
    for number, expected in found.items():
        loaded = run_ranks(1, load_numbered, str(tmp_path), number)[0]
        for name, value in expected.items():
            np.testing.assert_array_equal(loaded[name], value, err_msg=f"{number} {name}")
    assert any(not np.array_equal(found["1"][name], found["2"][name]) for name in found["1"])


def save_two(rank: int, root: str) -> dict[str, np.ndarray]:
    sharded = sharded_model({})
    one_epoch(rank, 2, sharded)
    saving.save(Path(root), sharded, catalogue(), manifest(1), Workers())
    saving.save(Path(root), sharded, catalogue(), manifest(2), Workers())
    return whole(sharded.weights())


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[Path, dict[str, np.ndarray]]:
    root = tmp_path_factory.mktemp("checkpoints")
    return root, run_ranks(2, save_two, str(root))[0]


@pytest.fixture
def root(saved, tmp_path) -> Path:
    for path in saved[0].iterdir():
        (tmp_path / path.name).mkdir()
        for file in path.iterdir():
            (tmp_path / path.name / file.name).write_bytes(file.read_bytes())
    return tmp_path


@pytest.mark.ranks
def test_inference_needs_one_process(saved, monkeypatch):
    for module in (checkpoints, protocol):
        monkeypatch.setattr(module, "model_module", lambda _: tiny)
    path = max(saved[0].iterdir())
    model, found = load_for_inference(path, tiny.schema())
    assert (found.epoch, found.metrics) == (2, {"auc": 0.7})
    for name, weight in model.state_dict().items():
        np.testing.assert_array_equal(weight.numpy(), saved[1][f"model.{name}"])
    assert not model.training


@pytest.mark.ranks
@pytest.mark.parametrize("damage", ["no manifest", "cut manifest", "missing file", "short file", "one bit"])
def test_a_torn_checkpoint_is_passed_over_by_name(root, damage, caplog):
    newest = max(root.iterdir())
    file = max(newest.glob("*.distcp"), key=lambda f: f.stat().st_size)
    content = bytearray(file.read_bytes())
    if damage == "no manifest":
        (newest / "manifest.json").unlink()
    elif damage == "cut manifest":
        (newest / "manifest.json").write_text((newest / "manifest.json").read_text()[:100])
    elif damage == "missing file":
        file.unlink()
    elif damage == "short file":
        file.write_bytes(content[:-1])
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        found = latest_valid(root)
    assert found is not None and found.manifest.epoch == 1
    assert newest.name in caplog.text


def save_without_room(rank: int, root: str, full_on: int, limit_bytes: int, said: str) -> None:
    sharded = sharded_model({})
    saving.save(Path(root), sharded, catalogue(), manifest(1), Workers())
    if rank == full_on:  # as a full disk: no file of this process may grow beyond the limit
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, resource.RLIM_INFINITY))
    long = manifest(2).model_copy(update={"history": [{"auc": 0.5}] * 4000})
    with pytest.raises(CheckpointError, match=f"{said}' cannot be written: File too large; make room"):
        saving.save(Path(root), sharded, catalogue(), long, Workers())


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("full_on", "limit_bytes", "said"), [(1, 1000, "epoch-0002-[0-9a-f]+"), (0, 60_000, "manifest.json")]
)
def test_a_checkpoint_that_finds_no_room_leaves_the_last_one(tmp_path, full_on, limit_bytes, said):
    run_ranks(2, save_without_room, str(tmp_path), full_on, limit_bytes, said)
    [left] = tmp_path.iterdir()
    assert verify(left).epoch == 1


def save_what_diverged(rank: int, root: str) -> None:
    sharded = sharded_model({"kind": "row_wise"})
    saving.save(Path(root), sharded, catalogue(), manifest(1), Workers())
    if rank == 1:
        [(rows, _)] = local(sharded.weights()["model.deep.embedding_bags.user.weight"])
        rows[0] = float("inf")
    with pytest.raises(NonFiniteLossError, match="after step 10 weights are not finite"):
        saving.save(Path(root), sharded, catalogue(), manifest(2), Workers())


@pytest.mark.ranks
def test_what_is_not_finite_on_any_worker_is_not_saved(tmp_path):
    run_ranks(2, save_what_diverged, str(tmp_path))
    [left] = tmp_path.iterdir()
    assert verify(left).epoch == 1


@pytest.mark.ranks
def test_retain_keeps_what_it_is_told_to(root):
    first, second = sorted(root.iterdir())
    (root / "epoch-0003-torn").mkdir()
    retain(root, [second])
    assert list(root.iterdir()) == [second]
    verify(second)
    assert not first.exists()
    (second / "manifest.json").write_text("{")
    retain(root, [second])  # by name: what is damaged is for those to tell who read it
    assert second.exists()


@pytest.mark.ranks
def test_another_schema_is_refused_by_its_difference(root, monkeypatch):
    for module in (checkpoints, protocol):
        monkeypatch.setattr(module, "model_module", lambda _: tiny)
    grown = tiny.schema().fitted({"user": 50, "item": 41})
    with pytest.raises(CheckpointError, match=r"'item' changed: rows 40 -> 41.*'history' changed"):
        load_for_inference(max(root.iterdir()), grown)
    fewer = tiny.schema().select(["user", "item", "history", "age"])
    with pytest.raises(CheckpointError, match="'length' is gone"):
        load_for_inference(max(root.iterdir()), fewer)


def test_nothing_to_resume_from(tmp_path):
    assert latest_valid(tmp_path / "none") is None
