"""The global-time split of ReChorus: each file's rows are one split's, and no other's."""

from pathlib import Path

import pyarrow.compute as pc
import pytest

from recsys_dist.data.sources.ml1m_ctr import NAMES, Config, Source
from recsys_dist.data.split import SPLITS
from recsys_dist.errors import SourceError
from tests.data.sources.published import REAL, events_of, make, ml1m_ctr

FOLDER = REAL / "ml-1m"


def test_files_are_splits_and_the_past_is_read_from_all_before(tmp_path: Path) -> None:
    made = make(Source(Config.parse(ml1m_ctr(tmp_path))))
    keys = {
        name: [(r["user_id"], r["item_id"], r["like"]) for r in rows] for name, rows in made.examples.items()
    }
    assert keys == {
        "train": [("10", "52", 0), ("10", "51", 1), ("20", "51", 0)],
        "valid": [("10", "53", 1), ("20", "52", 0)],
        "test": [("10", "54", 1)],
    }
    test = made.examples["test"][0]
    assert test["liked"] == ["51", None]  # no training day knows film 53
    assert test["disliked"] == ["52"] and test["rated"] == ["52", "51", None]
    assert test["hour"] == 1 and test["weekday"] == 1  # Monday 18 November 2002, midnight at UTC+8
    assert test["rating"] == 4


def test_length_of_the_past_and_a_file_without_a_column(tmp_path: Path) -> None:
    source = Source(Config.parse({**ml1m_ctr(tmp_path), "max_length": 7}))
    assert {f.max_length for f in source.schema().sequences} == {7}
    other = tmp_path / "splits" / "ctr_by_day" / "dev.parquet"
    other.write_bytes((tmp_path / "splits" / "ctr_by_day" / "dev.parquet").read_bytes()[:100])
    with pytest.raises(SourceError, match=r"dev\.parquet"):
        list(source.read(source.parts()[1]))


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"ml-1m is not at {FOLDER}")
def test_the_real_split() -> None:
    source = Source(Config(path=str(FOLDER)))
    rows = {}
    for at, name in enumerate(NAMES):
        events = events_of(source, (name,))
        rows[name] = len(events)
        assert set(source.default_split().assign(events["date"])) == {at}, f"{name} is not {SPLITS[at]}"
        assert pc.all(pc.equal(events["like"], pc.greater_equal(events["rating"], 4).cast("int8"))).as_py()
        assert pc.all(pc.not_equal(events["like"], events["dislike"])).as_py()
    assert list(rows.values()) == [983_836, 5_190, 5_176]
