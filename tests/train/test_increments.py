"""Checkpoints of changed rows: which rows they hold, when they are full ones instead, what they stand on."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from recsys_dist.errors import CheckpointError
from recsys_dist.train import checkpoint as checkpoints
from recsys_dist.train import saving, trainer
from recsys_dist.train.checkpoint import MANIFEST, Checkpoint, latest_valid, retain, verify
from recsys_dist.train.increments import Base
from recsys_dist.train.loop import Workers
from recsys_dist.train.pretrained import RESULT
from recsys_dist.train.settings import TrainConfig
from tests.train import tiny
from tests.train.ranks import run_ranks
from tests.train.test_checkpoint import catalogue, few_rows, manifest, one_epoch, sharded_model


def save_four(rank: int, root: str) -> None:
    """Of all rows, of a few, of nearly all, and of a few: the third one is not worth an increment."""
    sharded, background = sharded_model({}), saving.Background(Workers())
    saving.watch(sharded, at_most=0.9)  # the dense part alone is half
    for number in (1, 2, 3, 4):
        if number % 2:
            one_epoch(rank, 1, sharded)
        else:
            few_rows(rank, sharded, number)
        told = manifest(number).model_copy(update={"base": Base(name="of", content="one before")})
        background.save(Path(root), sharded, catalogue(), told)
    background.wait()


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("increments")
    run_ranks(1, save_four, str(root))
    return root


@pytest.fixture
def root(saved, tmp_path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def numbered(root: Path, number: int) -> Path:
    [path] = root.glob(f"epoch-000{number}-*")
    return path


@pytest.mark.ranks
def test_only_rows_that_were_looked_up_are_saved_while_these_are_few(saved):
    first, second, third, fourth = (numbered(saved, number) for number in (1, 2, 3, 4))
    bases = [verify(path).base for path in (first, second, third, fourth)]
    assert [base and base.name for base in bases] == [None, first.name, None, third.name]
    of_users = "rows.0.0.model.deep.embedding_bags.user.weight"
    size = FileSystemReader(fourth).read_metadata().state_dict_metadata[of_users].size
    rows = torch.empty(size, dtype=torch.int64)
    checkpoints.read(fourth, {of_users: rows})
    assert set(rows.tolist()) == set(tiny.batch_of(2, "few", 4).sparse["user"].values().tolist())


@pytest.mark.ranks
@pytest.mark.parametrize("damage", ["cut", "gone", "another"])
def test_an_increment_without_its_base_is_passed_over(root, damage):
    base, warnings = numbered(root, 3), []
    if damage == "cut":
        file = base / "__0_0.distcp"
        file.write_bytes(file.read_bytes()[:-1])
    else:
        shutil.rmtree(base)
    if damage == "another":
        shutil.copytree(numbered(root, 1), base)
    found = latest_valid(root, warnings.append)
    assert found is not None and found.path == numbered(root, 2)
    assert numbered(root, 4).name in warnings[0] and base.name in warnings[0]


@pytest.mark.ranks
def test_what_a_kept_one_stands_on_is_kept(root):
    third, fourth = numbered(root, 3), numbered(root, 4)
    retain(root, Checkpoint(fourth, verify(fourth)).stands_on())
    assert sorted(root.iterdir()) == [third, fourth]
    verify(fourth)


@pytest.mark.ranks
def test_of_two_checkpoints_of_an_epoch_the_whole_one_is_taken(root):
    whole = numbered(root, 3)
    for name in ("epoch-0003-00000000", "epoch-0003-zzzzzzzz"):
        shutil.copytree(whole, root / name)
        (root / name / ".metadata").write_bytes(b"")
    assert checkpoints.of_epoch(root, 3) == whole
    shutil.rmtree(whole)
    with pytest.raises(
        CheckpointError, match=r"epoch 3, .*\.metadata' has 0 bytes instead of .* trains it anew"
    ):
        checkpoints.of_epoch(root, 3)


@pytest.mark.ranks
def test_a_finished_run_is_one_no_more_when_its_checkpoint_is_damaged(root):
    result, whole = root.parent / RESULT, numbered(root, 3)
    result.write_text(json.dumps({"checkpoint": f"{root.name}/{whole.name}"}))
    cfg = TrainConfig.parse({"data": "d", "model": {"name": "lr"}})
    trainer._forget_what_is_damaged(cfg, root.parent)
    assert result.exists() and whole.exists()
    (whole / "__0_0.distcp").write_bytes(b"")
    elsewhere = cfg.model_copy(update={"checkpoints": f"file://{root}/store"})
    kept = root / "store" / root.parent.name / root.name / whole.name
    kept.mkdir(parents=True)
    (kept / MANIFEST).write_text("{}")
    trainer._forget_what_is_damaged(elsewhere, root.parent)  # a copy, which will be made again
    assert result.exists() and root.exists() and not whole.exists()
    whole.mkdir()
    (kept / MANIFEST).unlink()
    trainer._forget_what_is_damaged(elsewhere, root.parent)  # nowhere any more
    assert not result.exists() and not root.exists()
