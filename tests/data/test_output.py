"""Files are whole or absent, and a directory has one writer."""

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_dist.data.output import (
    LOCK,
    remove_partials,
    replacing,
    sole_writer,
    write_parquet,
    write_text,
)
from recsys_dist.errors import DataError

TABLE = pa.table({"x": [1, 2, 3]})


def test_a_table_is_written_with_checksums_in_new_directories(tmp_path: Path) -> None:
    file = tmp_path / "a/b/x.parquet"
    write_parquet(TABLE, file)
    assert pq.read_table(file, page_checksum_verification=True).equals(TABLE)
    assert [p.name for p in file.parent.iterdir()] == ["x.parquet"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    file = tmp_path / "x.txt"
    write_text("old", file)
    with pytest.raises(ZeroDivisionError), replacing(file) as partial:
        partial.write_text("half")
        assert file.read_text() == "old"
        raise ZeroDivisionError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.txt", "old")]


def test_a_full_disk_is_named_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.txt' cannot be written: No space left on device; make room"):  # noqa: SIM117
        with replacing(tmp_path / "x.txt"):
            raise OSError(errno.ENOSPC, "Error writing bytes to file")


def test_a_file_where_a_directory_should_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(DataError, match="taken"):
        write_parquet(TABLE, tmp_path / "taken/x.parquet")
    with pytest.raises(DataError, match="taken"), sole_writer(tmp_path / "taken"):
        pass
    assert (tmp_path / "taken").read_text() == "mine"


def test_leftovers_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    left = tmp_path / "deep/.part-00000.parquet.123.partial"
    left.parent.mkdir()
    left.write_text("half")
    with sole_writer(tmp_path):
        assert left.exists(), "whose it is has yet to be seen"
    remove_partials(tmp_path)
    assert not left.exists()


def _hold(directory: Path, held: object) -> None:
    with sole_writer(directory):
        held.set()  # type: ignore[attr-defined]
        time.sleep(60)


def test_a_second_writer_waits_until_the_first_is_gone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    first = context.Process(target=_hold, args=(tmp_path, held))
    first.start()
    assert held.wait(60) and first.pid is not None
    signal.signal(signal.SIGALRM, lambda *_: os.kill(first.pid, signal.SIGKILL))  # type: ignore[arg-type]
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    with sole_writer(tmp_path):  # waits; a lock outlives no process, however it ended
        first.join(10)
        assert first.exitcode == -signal.SIGKILL
    assert f"{tmp_path} is being written by another process; waiting for it" in caplog.text
    assert (tmp_path / LOCK).exists()
