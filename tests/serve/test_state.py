"""New events survive a restart, are seen at once by other processes, and make a log that prepare reads."""

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_dist.bundle import Bundle
from recsys_dist.data import transforms
from recsys_dist.data.sources import parquet
from recsys_dist.errors import StateError
from recsys_dist.schema import Schema
from recsys_dist.serve.api import Event, RecommendRequest
from recsys_dist.serve.events import canonical, describe_log, log_yaml
from recsys_dist.serve.recommend import Recommender
from recsys_dist.serve.state import EmbeddedState, UserState, canonical_schema, open_state
from recsys_dist.serve.stored import NEWEST_EVENTS


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


def searching(text: str) -> Event:
    plain = event("i1")
    return plain.model_copy(update={"context": {**plain.context, "query": text}})


@pytest.fixture(params=["embedded", "redis"])
def url(request: pytest.FixtureRequest) -> str | None:
    return None if request.param == "embedded" else request.getfixturevalue("server").url


@pytest.fixture
def opened(bundle: Bundle, tmp_path: Path, url: str | None) -> Callable[..., UserState]:
    """The same state, as another process or a restarted one opens it."""
    return lambda schema=None: open_state(tmp_path, schema or canonical_schema(bundle), url, "model")


@pytest.fixture
def state(opened: Callable[..., UserState]) -> UserState:
    return opened()


def test_events_of_a_bundle_with_fewer_columns_stay_readable(
    bundle: Bundle, opened: Callable[..., UserState], tmp_path: Path
) -> None:
    every = canonical_schema(bundle)
    fewer = pa.schema([field for field in every if field.name not in ("device", "like")])
    for schema, item in ((fewer, "i1"), (every, "i2")):
        state = opened(schema)
        state.append(rows(bundle, event(item)).select(schema.names))
        state.write_log()
    for _ in range(2):  # a second time changes nothing
        describe_log(bundle, tmp_path)
        cfg = parquet.recognise(str(tmp_path))
        assert cfg is not None
        source = parquet.Source(cfg)
        read = pa.concat_tables(table for part in source.parts() for table in source.read(part))
        found = {row["item_id"]: (row["device"], row["like"]) for row in read.to_pylist()}
        assert found["i1"] == (None, 0) and set(found) == {"i1", "i2"}


def parts(directory: Path) -> list[Path]:
    return sorted((directory / "events").rglob("*.parquet"))


def rows(bundle: Bundle, *events: Event) -> pa.Table:
    return canonical(list(events), Recommender(bundle).spec)


def test_what_was_appended_is_read_by_others_and_after_a_restart(
    bundle: Bundle, state: UserState, opened: Callable[..., UserState]
) -> None:
    wanted = rows(bundle, event("i1"), event("i2", "2024-03-20T11:00:00Z"))
    state.append(wanted)
    other = opened()
    assert other.read(["u1"]).sort_by("timestamp") == wanted.combine_chunks()
    assert not len(other.read(["u2"]))
    state.close()
    again = opened()
    assert len(again.read(["u1", "nobody"])) == 2


def test_only_a_users_newest_events_are_read_and_those_that_are_alike_all_count(
    bundle: Bundle, state: UserState
) -> None:
    state.append(rows(bundle, *[event("i1", "2024-03-20T12:00:00Z")] * NEWEST_EVENTS))
    assert len(state.read(["u1"])) == NEWEST_EVENTS
    state.append(rows(bundle, event("i2", "2024-03-20T13:00:00Z"), event("i3", "2024-03-20T11:00:00Z")))
    assert sorted(state.read(["u1"])["item_id"].to_pylist()) == ["i1"] * (NEWEST_EVENTS - 1) + ["i2"]


def test_a_bundle_with_other_columns_reads_the_same_events(
    bundle: Bundle, state: UserState, opened: Callable[..., UserState]
) -> None:
    state.append(rows(bundle, event("i1")))
    fields = [field for field in canonical_schema(bundle) if field.name != "device"]
    other = opened(pa.schema([*fields, pa.field("page", pa.string())]))
    [found] = other.read(["u1"]).to_pylist()
    assert found["item_id"] == "i1" and found["page"] is None and "device" not in found


def test_a_bundle_reads_as_numbers_what_another_kept_as_text_and_as_text_what_it_kept_as_numbers(
    bundle: Bundle, opened: Callable[..., UserState]
) -> None:
    def reading(device: pa.DataType) -> UserState:
        schema = canonical_schema(bundle)
        return opened(schema.set(schema.get_field_index("device"), pa.field("device", device)))

    def told(of: UserState, device: pa.Array, *hours: int) -> None:
        events = rows(bundle, *(event("i1", f"2024-03-20T{hour}:00:00Z") for hour in hours))
        of.append(events.set_column(events.schema.get_field_index("device"), "device", device))

    def devices(of: UserState) -> list[Any]:
        return of.read(["u1"]).sort_by("timestamp")["device"].to_pylist()

    texts, numeric = reading(pa.string()), reading(pa.float64())
    told(texts, pa.array(["tv", "3e1", None]), 10, 11, 12)
    told(numeric, pa.array([2.0, 2.5]), 13, 14)
    assert devices(texts) == ["tv", "3e1", None, "2", "2.5"]
    assert devices(numeric) == [None, 30, None, 2, 2.5]
    assert numeric.write_log() == 5


def test_a_search_counts_once_an_event_tells_of_it(bundle: Bundle, state: UserState) -> None:
    """That of a request itself is not yet the past, nor that of another request in its batch."""

    def searched() -> list[list[int]]:
        asked = [
            RecommendRequest(user_id="u1", context={"query": text}, timestamp=at)
            for text, at in (("hats", datetime(2024, 3, 21, tzinfo=UTC)), ("coats", None))
        ]
        work = Recommender(bundle, state)._begin(asked, budget_ms=60_000)
        found: list[list[int]] = work.users["searched"].to_pylist()
        return found

    before = searched()
    assert before[0] == before[1]
    state.append(rows(bundle, event("i1"), searching("new words")))
    after = searched()
    assert after[0] == after[1] != before[0]
    new = transforms.words(pa.array(["new words"]), True, 64).flatten().to_pylist()
    assert after[0][-3:] == new


def test_events_are_written_to_the_log_once_by_day(
    bundle: Bundle, state: UserState, opened: Callable[..., UserState], tmp_path: Path
) -> None:
    state.append(rows(bundle, event("i1"), event("i2", "2024-03-21T10:00:00Z")))
    assert state.write_log() == 2 and state.write_log() == 0
    state.append(rows(bundle, event("i3")))
    assert opened().write_log() == 1
    files = sorted((file.parent.name, pq.read_table(file)["item_id"].to_pylist()) for file in parts(tmp_path))
    assert files == [("date=2024-03-20", ["i1"]), ("date=2024-03-20", ["i3"]), ("date=2024-03-21", ["i2"])]


def test_an_embedded_log_written_again_after_a_kill_repeats_nothing(bundle: Bundle, tmp_path: Path) -> None:
    state = EmbeddedState(tmp_path, canonical_schema(bundle))
    state.append(rows(bundle, event("i1")))
    state.write_log()
    with sqlite3.connect(tmp_path / "state.db") as db:  # killed before it noted what it wrote
        db.execute("DELETE FROM written")
    state.append(rows(bundle, event("i2")))
    state.write_log()
    written = pq.read_table(tmp_path / "events")
    assert sorted(written["item_id"].to_pylist()) == ["i1", "i2"]


def test_requests_are_answered_without_a_file_that_fails(bundle: Bundle, tmp_path: Path) -> None:
    state = EmbeddedState(tmp_path, canonical_schema(bundle))
    state.append(rows(bundle, event("i1")))
    with sqlite3.connect(tmp_path / "state.db") as db:
        db.execute("DROP TABLE events")
    asked = RecommendRequest(user_id="u1", k=3, context={"device": "tv"})
    [answer] = asyncio.run(Recommender(bundle, state).recommend([asked], budget_ms=60_000))
    assert len(answer.items) == 3 and answer.degraded == ["state_failed"]
    with pytest.raises(StateError, match=r"state\.db.*no such table"):
        state.append(rows(bundle, event("i1")))


def test_who_reads_waits_for_no_writer(bundle: Bundle, tmp_path: Path) -> None:
    state = EmbeddedState(tmp_path, canonical_schema(bundle))
    state.append(rows(bundle, event("i1")))
    other = sqlite3.connect(tmp_path / "state.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # another process' slow write
    waiting = threading.Thread(target=state.append, args=(rows(bundle, event("i2")),))
    waiting.start()
    deadline = time.perf_counter() + 4
    while not state._lock.locked() and time.perf_counter() < deadline:
        time.sleep(0.001)
    began = time.perf_counter()
    assert state.read(["u1"])["item_id"].to_pylist() == ["i1"]
    assert time.perf_counter() - began < 0.5 and waiting.is_alive()
    other.execute("ROLLBACK")
    other.close()
    waiting.join()
    assert sorted(state.read(["u1"])["item_id"].to_pylist()) == ["i1", "i2"]


def test_prepare_reads_the_recorded_log(bundle: Bundle, state: UserState, tmp_path: Path) -> None:
    state.append(rows(bundle, event("i1"), event("i2")))
    state.write_log()
    pq.write_table(bundle.users.attributes, tmp_path / "users.parquet")
    pq.write_table(bundle.items.attributes, tmp_path / "items.parquet")
    of_all = {"recall_exposure_weight": 0.3, "recall_repeats": True}
    schema = Schema.parse({**bundle.encoders.schema.model_dump(), **of_all})
    of_bundle = replace(bundle, encoders=replace(bundle.encoders, schema=schema))
    (tmp_path / "log.yaml").write_text(log_yaml(of_bundle))
    cfg = parquet.recognise(str(tmp_path))
    assert cfg is not None
    source = parquet.Source(cfg)
    table_rows = {schema.table(feature): feature.rows or 0 for feature in schema.ids}
    assert source.schema().fitted(table_rows) == schema
    read = pa.concat_tables(table for part in source.parts() for table in source.read(part))
    assert sorted(read["item_id"].to_pylist()) == ["i1", "i2"]
    assert set(read["click"].to_pylist()) == {1}
