"""The same bytes are the same log, whenever they were written; other bytes are another."""

import json
import os
from pathlib import Path

import fsspec
import pytest

from recsys_dist.data import identity
from recsys_dist.data.pipeline import PrepareConfig, _settings
from tests.data import small_log
from tests.data.small_source import Source, write_log


@pytest.fixture
def log(tmp_path: Path) -> Source:
    return Source(write_log(tmp_path, small_log.events()))


def first_of(log: Source) -> Path:
    return Path(log.parts()[0].file)


def test_a_touched_file_is_the_same_log(log: Source) -> None:
    before, seen = identity.look(log, {})
    os.utime(first_of(log), (1, 1))
    again, seen_again = identity.look(log, seen)
    assert again == before
    assert seen_again != seen, "the new time is not noted, so the file would be read each time"


def test_a_changed_file_is_another_log_whatever_its_size(log: Source) -> None:
    before, seen = identity.look(log, {})
    content = bytearray(first_of(log).read_bytes())
    content[-1] ^= 1
    first_of(log).write_bytes(content)
    os.utime(first_of(log), (1, 1))
    assert identity.look(log, seen)[0] != before


def test_a_file_as_remembered_is_not_read_again(log: Source, tmp_path: Path) -> None:
    file = str(first_of(log))
    _, seen = identity.look(log, {})
    (tmp_path / "raw.json").write_text(json.dumps({**seen, file: [*seen[file][:2], "as noted"]}))
    known = identity.remembered(tmp_path / "raw.json")
    assert identity.look(log, known)[1][file][2] == "as noted"


def test_a_remote_file_counts_by_size_and_time() -> None:
    fsspec.filesystem("memory").pipe("/identity/a.csv", b"one")
    first = identity.state("memory://identity/a.csv")
    fsspec.filesystem("memory").pipe("/identity/a.csv", b"three")
    assert identity.state("memory://identity/a.csv") != first


@pytest.mark.parametrize("note", ["", "[1]", "{"])
def test_a_note_that_is_none_is_no_note(note: str, tmp_path: Path) -> None:
    (tmp_path / "raw.json").write_text(note)
    assert identity.remembered(tmp_path / "raw.json") == {}
    assert identity.remembered(tmp_path / "missing.json") == {}


def test_where_a_log_lies_is_no_setting_of_it() -> None:
    here, there, other = (
        PrepareConfig.parse({"source": {"kind": "frappe", "path": path}, "buckets": buckets})
        for path, buckets in (("logs", 4), ("/elsewhere/logs", 4), ("logs", 5))
    )
    assert _settings(here) == _settings(there) != _settings(other)
