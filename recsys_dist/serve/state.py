"""What users did lately: what the bundle knows of them, and what they have done since.

`UserState` is all that serving asks for. `EmbeddedState` keeps new events in an SQLite file that all replicas
of a machine share and that survives a restart; `redis_state.RedisState` keeps them in a server that several
machines share. Every event is also written, day by day, to Parquet files with a `log.yaml`, which
`jobs.prepare parquet` reads.
"""

import importlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.bundle import Bundle
from recsys_dist.data.keys import Keys
from recsys_dist.data.logs import LogSpec
from recsys_dist.data.output import naming
from recsys_dist.errors import ConfigError, StateError
from recsys_dist.serve.stored import NEWEST_EVENTS, decode, encode, write_days

_WAIT_S = 5.0  # for another process' write


class UserState(Protocol):
    """Events since the bundle was made; safe to use from several threads and processes.

    Every method raises StateError where the state does not answer.
    """

    def read(self, users: Sequence[str]) -> pa.Table:
        """Canonical events of these users, in any order; columns as `append` got them."""
        ...

    def append(self, events: pa.Table) -> None:
        """Keep canonical events; once this returns they survive a crash, and the next `read` has them."""
        ...

    def write_log(self) -> int:
        """Write the events since the last call to the log; returns how many. Each is written once.

        What was killed in the middle is done again by the next call, over the same files.
        """
        ...

    def close(self) -> None: ...


def open_state(directory: Path, schema: pa.Schema, url: str | None, name: str) -> UserState:
    """The state at `url`, below `name` there, or in `directory` without one; the log goes to `directory`.

    schema  the canonical log's. Does not wait for a server: `check_state` does. ConfigError for a wrong URL.
    """
    if not url:
        return EmbeddedState(directory, schema)
    state: UserState = _redis_state().RedisState(directory, schema, _address(url), name)
    return state


def check_state(url: str | None, name: str) -> None:
    """StateError where the state's server does not answer or refuses writes; ConfigError for a wrong URL."""
    if url:
        _redis_state().check(_address(url), name)


def _address(url: str) -> str:
    """Itself, or for `env:NAME` what that variable holds: a password is not for command lines."""
    variable = url.removeprefix("env:")
    if variable == url:
        return url
    if not (found := os.environ.get(variable)):
        raise ConfigError(f"state_url is {url!r}, and the environment of this process has no {variable}")
    return found


def _redis_state() -> ModuleType:
    try:
        return importlib.import_module("recsys_dist.serve.redis_state")
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise ConfigError("state_url needs the redis client: pip install 'recsys-dist[redis]'") from None


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
        self._lock, self._reading = threading.Lock(), threading.Lock()  # who reads waits for no write
        with naming(directory):
            directory.mkdir(parents=True, exist_ok=True)
        with self._naming():
            self._db, self._reader = (
                sqlite3.connect(
                    directory / "state.db", timeout=_WAIT_S, check_same_thread=False, isolation_level=None
                )
                for _ in range(2)
            )
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
        with self._reading, self._naming():
            found = [row for user in users for row in self._reader.execute(query, (user, NEWEST_EVENTS))]
        return decode([event for (event,) in found], self.schema)

    def append(self, events: pa.Table) -> None:
        values = encode(events, self.schema)
        with self._writing() as db:
            db.executemany("INSERT INTO events (user_id, timestamp, event) VALUES (?, ?, ?)", values)

    def write_log(self) -> int:
        """The same; one process at a time does it."""
        with self._writing() as db:
            (done,) = db.execute("SELECT COALESCE(MAX(up_to), 0) FROM written").fetchone()
            found = db.execute("SELECT event, number FROM events WHERE number > ?", (done,)).fetchall()
            if not found:
                return 0
            write_days(decode([event for event, _ in found], self.schema), self.directory, f"{done + 1:012d}")
            db.execute("INSERT INTO written VALUES (?)", (found[-1][1],))
        return len(found)

    def close(self) -> None:
        with self._lock, self._reading:
            self._db.close()
            self._reader.close()

    @contextmanager
    def _writing(self) -> Iterator[sqlite3.Connection]:
        with self._lock, self._naming():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextmanager
    def _naming(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StateError(
                f"the users' state {str(self.directory / 'state.db')!r} cannot be used: {error}; make room, "
                "mend the file, or name another directory as `state`"
            ) from error
