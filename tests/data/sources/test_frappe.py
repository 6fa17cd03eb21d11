"""Frappe: three files, three days; every line is an example, repeated ones too."""

from pathlib import Path

import pyarrow.compute as pc
import pytest

from recsys_dist.data.logs import LogSpec, validate
from recsys_dist.data.sources.frappe import Config, Source
from recsys_dist.data.split import SPLITS
from tests.data.sources.published import FRAPPE, REAL, events_of, frappe, make

FOLDER = REAL / "frappe"


def test_a_file_is_a_split_and_a_field_a_feature(tmp_path: Path) -> None:
    made = make(Source(Config.parse(frappe(tmp_path))))
    assert {name: len(rows) for name, rows in made.examples.items()} == dict.fromkeys(SPLITS, len(FRAPPE))
    columns = ["user_id", "item_id", "click", "daytime", "cost", "country", "city"]
    first, last = (made.events.select(columns).to_pylist()[at] for at in (0, -1))
    assert first == dict(zip(columns, ["0", "10", 1, "20", "60", "80", "90"], strict=True))
    assert last == dict(zip(columns, ["2", "10", 0, "21", "61", "81", "91"], strict=True))
    features = Source(Config(path="")).schema().features
    assert [f.name for f in features][:3] == ["user", "item", "daytime"] and len(features) == 10


def test_a_line_that_is_none_is_quarantined(tmp_path: Path) -> None:
    source = Source(Config.parse(frappe(tmp_path)))
    (tmp_path / "frappe.test.libfm").write_text(f"{FRAPPE[0]}\n1 0:1 10:1\n{FRAPPE[3].replace('-1', '2')}\n")
    spec, part = LogSpec.from_schema(source.schema()), source.parts()[2]
    checked = [validate(chunk, spec, part.name, source.timestamp_unit) for chunk in source.read(part)]
    refused = [row for one in checked for row in one.quarantined.to_pylist()]
    assert {(r["row"], r["reason"]) for r in refused} == {
        (1, "wrong number of fields"),
        (2, "click is not 0 or 1"),
    }
    assert sum(len(one.kept) for one in checked) == 1


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"Frappe is not at {FOLDER}")
def test_the_real_frappe() -> None:
    source = Source(Config(path=str(FOLDER)))
    events = events_of(source)
    days = pc.value_counts(events["date"]).to_pylist()
    assert [day["counts"] for day in days] == [202_027, 57_722, 28_860]
    assert pc.sum(events["click"]).as_py() == 67_604 + 19_063 + 9_536 == 96_203
    fields = ["user_id", "item_id", "daytime", "weekday", "isweekend", "homework", "cost", "weather"]
    distinct = [pc.count_distinct(events[name]).as_py() for name in [*fields, "country", "city"]]
    assert distinct == [957, 4_082, 7, 7, 2, 3, 2, 9, 80, 233]
