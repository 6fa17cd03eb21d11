"""What users did lately: what the bundle knows of them, and what they have done since.

`UserState` is all that serving asks for. `EmbeddedState` keeps new events in an SQLite file that all replicas
of a machine share and that survives a restart; every event it takes is also written, day by day, to Parquet
files with a `log.yaml`, which `jobs.prepare parquet` reads.
"""

import json
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.bundle import Bundle
from recsys_dist.data.keys import Keys
from recsys_dist.data.logs import LogSpec
from recsys_dist.data.output import naming, write_parquet

_NEWEST_EVENTS = 500  # of a user since the bundle was made: bounds a request's work
_WAIT_S = 5.0  # for another process' write


class UserState(Protocol):
    """Events since the bundle was made; safe to use from several threads and processes."""

    def read(self, users: Sequence[str]) -> pa.Table:
        """Canonical events of these users, in any order; columns as `append` got them."""
        ...

    def append(self, events: pa.Table) -> None:
        """Keep canonical events; once this returns they survive a crash, and the next `read` has them."""
        ...


def canonical_schema(bundle: Bundle) -> pa.Schema:
    """Columns of the log that the bundle's features and labels are made of."""
    return LogSpec.from_schema(bundle.encoders.schema).arrow_schema()


class BundleEvents:
    """The events and seen items that come with a bundle, by user."""

    def __init__(self, bundle: Bundle) -> None:
        self._events = bundle.events.combine_chunks()
        users = pc.value_counts(self._events["user_id"].combine_chunks())  # in their order: sorted
        self._users = Keys(users.field("values"))
        self._offsets = np.r_[0, np.cumsum(users.field("counts").to_numpy())]
        self._seen_users = Keys(bundle.seen["user_id"].combine_chunks())
        lists = bundle.seen["items"].combine_chunks()
        self._seen_offsets, self._seen = lists.offsets.to_numpy(), lists.values.to_numpy()

    def read(self, users: Sequence[str]) -> pa.Table:
        """The newest events of these users."""
        found = self._users.positions(pa.array(users, pa.string()))
        at = [np.arange(self._offsets[p - 1], self._offsets[p]) for p in found if p]
        return self._events.take(pa.array(np.concatenate([*at, np.empty(0, np.int64)])))

    def seen(self, users: Sequence[str]) -> list[np.ndarray]:
        """Rows of the item table that each user was shown."""
        found = self._seen_users.positions(pa.array(users, pa.string()))
        offsets = self._seen_offsets
        return [self._seen[offsets[p - 1] : offsets[p]] if p else self._seen[:0] for p in found]


class EmbeddedState:
    """An SQLite file in `directory`, beside `events/date=.../*.parquet`; `schema` is the canonical log's."""

    def __init__(self, directory: Path, schema: pa.Schema) -> None:
        self.directory, self.schema = directory, schema
        self._lock = threading.Lock()
        with naming(directory):
            directory.mkdir(parents=True, exist_ok=True)
        self._db = sqlite3.connect(
            directory / "state.db", timeout=_WAIT_S, check_same_thread=False, isolation_level=None
        )
        with self._lock:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS events (number INTEGER PRIMARY KEY, user_id TEXT NOT NULL, "
                "timestamp INTEGER NOT NULL, event TEXT NOT NULL)"
            )
            self._db.execute("CREATE INDEX IF NOT EXISTS newest ON events (user_id, timestamp)")
            self._db.execute("CREATE TABLE IF NOT EXISTS written (up_to INTEGER NOT NULL)")

    def read(self, users: Sequence[str]) -> pa.Table:
        query = "SELECT event FROM events WHERE user_id = ? ORDER BY timestamp DESC LIMIT ?"
        with self._lock:
            found = [row for user in users for row in self._db.execute(query, (user, _NEWEST_EVENTS))]
        return self._table(found)

    def append(self, events: pa.Table) -> None:
        plain = events.select(self.schema.names).cast(self.schema)
        us = plain["timestamp"].cast(pa.int64()).to_pylist()
        days = plain["date"].cast(pa.int32()).to_pylist()
        rows = plain.drop_columns(["timestamp", "date"]).to_pylist()
        values = [
            (row["user_id"], at, json.dumps({"timestamp": at, "date": day, **row}))
            for row, at, day in zip(rows, us, days, strict=True)
        ]
        with self._writing() as db:
            db.executemany("INSERT INTO events (user_id, timestamp, event) VALUES (?, ?, ?)", values)

    def write_log(self) -> int:
        """Write the events since the last call to the log; returns how many. One process at a time does it.

        A file is named by its first event, so a call that was killed is done again over the same files.
        """
        with self._writing() as db:
            (done,) = db.execute("SELECT COALESCE(MAX(up_to), 0) FROM written").fetchone()
            found = db.execute("SELECT event, number FROM events WHERE number > ?", (done,)).fetchall()
            if not found:
                return 0
            table = self._table([(event,) for event, _ in found])
            for day in pc.unique(table["date"]).to_pylist():
                of_day = table.filter(pc.equal(table["date"], day)).drop_columns(["date"])
                write_parquet(of_day, self.directory / f"events/date={day}/part-{done + 1:012d}.parquet")
            db.execute("INSERT INTO written VALUES (?)", (found[-1][1],))
        return len(found)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    def _table(self, rows: list[tuple[str]]) -> pa.Table:
        """Canonical events from JSON; a column that was not there when an event came is null."""
        stored = {"timestamp": pa.int64(), "date": pa.int32()}
        raw = pa.schema([(field.name, stored.get(field.name, field.type)) for field in self.schema])
        return pa.Table.from_pylist([json.loads(event) for (event,) in rows], schema=raw).cast(self.schema)
