"""New events survive a restart, are seen at once by other processes, and make a log that prepare reads."""

import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_dist.bundle import Bundle
from recsys_dist.data.sources import parquet
from recsys_dist.serve.api import Event
from recsys_dist.serve.events import canonical, log_yaml
from recsys_dist.serve.recommend import Recommender
from recsys_dist.serve.state import EmbeddedState, canonical_schema


def event(item: str, at: str = "2024-03-20T10:00:00Z") -> Event:
    return Event.model_validate(
        {
            "user_id": "u1",
            "item_id": item,
            "timestamp": at,
            "labels": {"click": 1},
            "context": {"device": "tv"},
        }
    )


@pytest.fixture
def state(bundle: Bundle, tmp_path: Path) -> EmbeddedState:
    return EmbeddedState(tmp_path, canonical_schema(bundle))


def rows(bundle: Bundle, *events: Event) -> pa.Table:
    return canonical(list(events), Recommender(bundle).spec)


def test_what_was_appended_is_read_by_others_and_after_a_restart(
    bundle: Bundle, state: EmbeddedState
) -> None:
    wanted = rows(bundle, event("i1"), event("i2", "2024-03-20T11:00:00Z"))
    state.append(wanted)
    other = EmbeddedState(state.directory, state.schema)
    assert other.read(["u1"]).sort_by("timestamp") == wanted.combine_chunks()
    assert not len(other.read(["u2"]))
    state.close()
    again = EmbeddedState(state.directory, state.schema)
    assert len(again.read(["u1", "nobody"])) == 2


def test_a_bundle_with_other_columns_reads_the_same_events(bundle: Bundle, state: EmbeddedState) -> None:
    state.append(rows(bundle, event("i1")))
    fields = [field for field in state.schema if field.name != "device"]
    other = EmbeddedState(state.directory, pa.schema([*fields, pa.field("page", pa.string())]))
    [found] = other.read(["u1"]).to_pylist()
    assert found["item_id"] == "i1" and found["page"] is None and "device" not in found


def test_events_are_written_to_the_log_once_by_day(bundle: Bundle, state: EmbeddedState) -> None:
    state.append(rows(bundle, event("i1"), event("i2", "2024-03-21T10:00:00Z")))
    assert state.write_log() == 2 and state.write_log() == 0
    state.append(rows(bundle, event("i3")))
    assert EmbeddedState(state.directory, state.schema).write_log() == 1
    files = sorted(
        file.relative_to(state.directory).as_posix() for file in state.directory.rglob("*.parquet")
    )
    assert files == [
        "events/date=2024-03-20/part-000000000001.parquet",
        "events/date=2024-03-20/part-000000000003.parquet",
        "events/date=2024-03-21/part-000000000001.parquet",
    ]


def test_a_log_written_again_after_a_kill_repeats_nothing(bundle: Bundle, state: EmbeddedState) -> None:
    state.append(rows(bundle, event("i1")))
    state.write_log()
    with sqlite3.connect(state.directory / "state.db") as db:  # killed before it noted what it wrote
        db.execute("DELETE FROM written")
    state.append(rows(bundle, event("i2")))
    state.write_log()
    written = pq.read_table(state.directory / "events")
    assert sorted(written["item_id"].to_pylist()) == ["i1", "i2"]


def test_prepare_reads_the_recorded_log(bundle: Bundle, state: EmbeddedState) -> None:
    state.append(rows(bundle, event("i1"), event("i2")))
    state.write_log()
    pq.write_table(bundle.users.attributes, state.directory / "users.parquet")
    pq.write_table(bundle.items.attributes, state.directory / "items.parquet")
    (state.directory / "log.yaml").write_text(log_yaml(bundle))
    cfg = parquet.recognise(str(state.directory))
    assert cfg is not None
    source = parquet.Source(cfg)
    assert [f.name for f in source.schema().features] == [f.name for f in bundle.encoders.schema.features]
    read = pa.concat_tables(table for part in source.parts() for table in source.read(part))
    assert sorted(read["item_id"].to_pylist()) == ["i1", "i2"]
    assert set(read["click"].to_pylist()) == {1}
