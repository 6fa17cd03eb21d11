from pathlib import Path

import pytest

from recsys_dist.errors import CheckpointError
from recsys_dist.train.fence import Fence, take_over
from recsys_dist.train.worker import FAILURE, write_failure


@pytest.mark.parametrize("elsewhere", [None, "store"])
def test_the_newest_group_of_the_newest_start_holds_the_run(tmp_path: Path, elsewhere: str | None) -> None:
    url = None if elsewhere is None else f"file://{tmp_path}/{elsewhere}"
    run = tmp_path / "run"
    run.mkdir()
    start = take_over(run, url)
    first = Fence(run, url, start)
    assert not first.holds(), "not yet"
    assert first.take() and first.holds()
    second = Fence(run, url, start)  # Ray Train started the workers again
    assert second.take() and second.holds() and not first.holds()
    late = Fence(run, url, start)  # starts only when its driver is dead and the run goes on elsewhere
    third = Fence(run, url, take_over(run, url))
    assert not second.holds() and not late.take()
    assert third.take() and not late.take() and third.holds()


def test_a_machine_that_was_taken_for_lost_finds_out_in_the_store(tmp_path: Path) -> None:
    url, here, there = f"file://{tmp_path}/store", tmp_path / "a" / "run", tmp_path / "b" / "run"
    for run in (here, there):
        run.mkdir(parents=True)
    frozen = Fence(here, url, take_over(here, url))
    assert frozen.take() and frozen.holds()
    newer = Fence(there, url, take_over(there, url))
    assert newer.take() and newer.holds() and not frozen.holds() and not frozen.take()
    assert frozen.holds_here() and newer.holds_here()
    (tmp_path / "store/run/held_by").unlink()
    (tmp_path / "store/run/held_by").mkdir()
    assert newer.holds(), "what cannot be read is no reason to stop"


def test_what_befalls_a_superseded_worker_does_not_end_the_run(tmp_path: Path) -> None:
    former, start = take_over(tmp_path, None), take_over(tmp_path, None)
    write_failure(tmp_path, CheckpointError("its files are gone"), former)
    assert not (tmp_path / FAILURE).exists()
    write_failure(tmp_path, CheckpointError("the disk is full"), start)
    assert "the disk is full" in (tmp_path / FAILURE).read_text()
