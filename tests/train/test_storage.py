"""Checkpoints on a file system that is reached through fsspec: `file://` is one that all processes see.

That training goes on from there, test_checkpoint and test_faults show.
"""

from types import SimpleNamespace

import pytest
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from upath import UPath

from recsys_dist.errors import CheckpointError, ConfigError, StoreError
from recsys_dist.train import saving, storage
from recsys_dist.train.checkpoint import MANIFEST, all_below, latest_valid, retain, verify
from recsys_dist.train.loop import Workers
from recsys_dist.train.settings import TrainConfig
from tests.train.test_checkpoint import catalogue, manifest, sharded_model


@pytest.fixture
def place(tmp_path) -> UPath:
    return storage.root(f"file://{tmp_path}/store")


@pytest.fixture
def save():
    """Saves the small model as the checkpoint of an epoch."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    sharded, workers = sharded_model({}), Workers()
    yield lambda place, epoch: saving.save(place, sharded, catalogue(), manifest(epoch), workers)
    dist.destroy_process_group()


def test_what_is_torn_is_passed_over_and_what_is_not_kept_is_gone(place, save, caplog):
    kept, torn, damaged = (save(place, epoch).path for epoch in (1, 2, 3))
    assert not isinstance(kept, storage.Path) and str(kept).startswith("file://")
    (torn / MANIFEST).unlink()
    file = next(damaged.glob("__0_*"))
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    found = latest_valid(place)
    assert found is not None and found.path == kept and verify(kept).epoch == 1
    assert "never committed" in caplog.text and "was changed" in caplog.text
    retain(place, [kept])
    assert [path.name for path in all_below(place)] == [kept.name]


def test_a_copy_is_whole_or_is_not_taken_for_one(place, save, tmp_path):
    saved = save(place, 1).path
    torn = tmp_path / "here" / saved.name  # as a fetch that was killed leaves it
    torn.mkdir(parents=True)
    (torn / ".metadata").write_bytes(b"half")
    copy = storage.fetch(saved, tmp_path / "here", last=MANIFEST)
    assert copy == torn and verify(copy) == verify(saved)


def test_a_store_that_fails_is_named(place, save, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise LookupError("no credentials")  # stores' drivers have errors of their own

    monkeypatch.setattr(type(place.fs), "open", refuse)
    with pytest.raises(
        CheckpointError, match=r"'file://.*' cannot be written: LookupError: no credentials; wh"
    ):
        save(place, 1)
    assert all_below(place) == []


def test_a_worker_that_is_lost_is_not_the_stores_fault(place):
    """What gloo raises in the others has Ray Train start all of them again."""
    with pytest.raises(RuntimeError, match="Connection reset"), storage.writing(place):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:525] Connection reset by peer")


def test_what_loses_a_file_while_it_is_written_is_not_committed(place, save, monkeypatch):
    saved = save(place, 1).path

    def save_and_lose(*args: object, storage_writer: object, **kwargs: object) -> object:
        written = dcp.save(*args, storage_writer=storage_writer, **kwargs)
        [torn] = [path for path in all_below(place) if path != saved]
        (torn / "__0_0.distcp").unlink()
        return written

    monkeypatch.setattr(saving, "dcp", SimpleNamespace(save=save_and_lose))
    with pytest.raises(CheckpointError, match=r"lost __0_0.distcp while it was written"):
        save(place, 2)
    assert all_below(place) == [saved]


def test_after_one_that_a_store_did_not_give_back_the_next_is_whole_and_full(place, monkeypatch):
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded, background = sharded_model({}), saving.Background(Workers())
        saving.watch(sharded, 1.0)
        with monkeypatch.context() as patched:
            patched.setattr(type(place.fs), "ls", _silent)
            background.save(place, sharded, catalogue(), manifest(1))
            with pytest.raises(CheckpointError, match=r"cannot be read now.*no answer"):
                background.wait()
        background.save(place, sharded, catalogue(), manifest(2))
        background.wait()
    finally:
        dist.destroy_process_group()
    found = latest_valid(place)
    assert found is not None and (found.manifest.epoch, found.manifest.base) == (2, None)
    assert all_below(place) == [found.path]


def test_a_store_that_does_not_answer_is_not_taken_for_one_without_checkpoints(place, save, monkeypatch):
    save(place, 1)
    for method in ("open", "info", "ls"):
        with (
            monkeypatch.context() as patched,
            pytest.raises(StoreError, match=r"cannot be read now.*no answer"),
        ):
            patched.setattr(type(place.fs), method, _silent)
            latest_valid(place)
    assert latest_valid(place) is not None


def _silent(*_: object, **__: object) -> None:
    raise TimeoutError("no answer")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("nowhere://bucket/x", r"checkpoints='nowhere://bucket/x': Unsupported filesystem: 'nowhere'"),
        ("gs://bucket/x", r"checkpoints='gs://bucket/x': Please install gcsfs"),
        (
            "file:///proc/x",
            r"checkpoints='file:///proc/x' cannot be written to and read back: .*another place",
        ),
    ],
)
def test_a_place_that_will_not_do_is_refused_before_anything_starts(url, said):
    with pytest.raises(ConfigError, match=said):
        storage.probe(url)


def test_where_checkpoints_lie_is_no_part_of_what_a_run_is(tmp_path):
    base = {"data": str(tmp_path), "model": {"name": "lr"}}
    elsewhere = TrainConfig.parse({**base, "checkpoints": "s3://bucket/x"})
    assert elsewhere.identity() == TrainConfig.parse(base).identity()
