"""What an opened data set says of files that are missing or torn."""

import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from recsys_dist.data.order import newest_rows
from recsys_dist.data.prepared import MANIFEST, Prepared
from recsys_dist.errors import DataError
from recsys_dist.train.plan import plan
from tests.train import prepared
from tests.train.runs import config

TRAIN, VALID = "ranking/train/part-00000.parquet", "ranking/valid/part-00001.parquet"


@pytest.mark.parametrize(
    ("name", "read"),
    [
        (MANIFEST, lambda data: Prepared.open(data.path)),
        ("items.parquet", lambda data: data.items),
        (VALID, lambda data: data.extremes("ranking/valid", "click")),
        (TRAIN, lambda data: newest_rows([(str(data.path / TRAIN), 400)], 0.5)),
        (TRAIN, lambda data: plan(config(data.path), data, 1)),
    ],
    ids=["manifest", "items", "footer", "timestamps", "plan"],
)
@pytest.mark.parametrize("left", [None, 0, 0.5])
def test_a_file_that_is_missing_or_torn_is_named(
    name: str, read: Callable[[Prepared], object], left: float | None, tmp_path: Path
) -> None:
    data = Prepared.open(prepared.make(tmp_path / "data"))
    file = data.path / name
    whole = file.read_bytes()
    file.unlink()
    if left is not None:
        file.write_bytes(whole[: int(left * len(whole))])
    said = f"{re.escape(name)}' cannot be read: .*; prepare again"
    if (name, left) == (MANIFEST, None):
        said = "holds no prepared data .*make it with"
    with pytest.raises(DataError, match=said):
        read(data)


def test_examples_that_are_gone_or_others_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = Prepared.open(prepared.make(tmp_path / "data"))
    assert data.whole() and not caplog.records
    file = data.path / TRAIN
    fewer = pq.read_table(file).slice(1)
    for change in (lambda: pq.write_table(fewer, file), lambda: file.write_bytes(b""), file.unlink):
        change()
        assert not data.whole() and TRAIN in caplog.records[-1].message
