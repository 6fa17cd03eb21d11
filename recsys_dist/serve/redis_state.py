"""The only `redis`: users' new events in a Redis or Valkey server, which several machines may share.

Keys, below `recsys_dist:NAME:` (the registered model's name; another database number in the URL separates
services of one name):

    user:ID   sorted set by time: the user's newest events, as many as `EmbeddedState` reads
    log       stream of all events that are not in a Parquet log yet

One server or a primary with replicas; not Redis Cluster, whose nodes cannot change both keys at once. What
was acknowledged survives what the server's persistence survives, and its memory must never be made room in
(`maxmemory-policy noeviction`, the default).
"""

import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow as pa
import redis
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError
from redis.retry import Retry

from recsys_dist.data.output import remove_partials, sole_writer, write_text
from recsys_dist.errors import ConfigError, StateError
from recsys_dist.serve.stored import NEWEST_EVENTS, decode, encode, write_days

log = logging.getLogger(__name__)
_SCHEMES = {
    "redis": "redis",
    "rediss": "rediss",
    "valkey": "redis",
    "valkeys": "rediss",
    "unix": "unix",
}
_READ_S = 0.05  # a quarter of a request's usual budget, which the models need the rest of
_REST_S = 1.0  # after a failed read nobody waits for the server so long: requests go on without
_WRITE_S = 1.0  # of a thread that nothing else waits for; a disk that syncs each write may take so long
_GROUP = "parquet"
_BATCH = 10_000  # events of one round of `write_log`


class RedisState:
    """`UserState` in the server at `url`; made without asking it, so that replicas start while it is away.

    `append` is all or nothing, and never repeated by itself. Where its answer is lost (StateError) the events
    may be stored all the same, and twice once they are sent again.
    """

    def __init__(self, directory: Path, schema: pa.Schema, url: str, name: str) -> None:
        self.directory, self.schema = directory, schema
        self._url, self._prefix = url, _prefix(name)
        self._reader, self._writer = _client(url, _READ_S), _client(url, _WRITE_S)
        self._rests_until = 0.0  # 0 where the last read had an answer

    def read(self, users: Sequence[str]) -> pa.Table:
        if time.monotonic() < self._rests_until:
            raise StateError(f"the users' state at {masked(self._url)} did not answer a moment ago")
        try:
            found = self._read(users)
        except StateError as error:
            if not self._rests_until:
                log.error("requests are answered without what users did lately: %s", error)
            self._rests_until = time.monotonic() + _REST_S
            raise
        self._rests_until = 0.0
        return decode([stored.partition(b" ")[2] for newest in found for stored in newest], self.schema)

    def _read(self, users: Sequence[str]) -> list[list[bytes]]:
        with _naming(self._url), self._reader.pipeline(transaction=False) as pipe:
            for user in users:
                pipe.zrevrange(self._user(user), 0, NEWEST_EVENTS - 1)
            return pipe.execute()

    def append(self, events: pa.Table) -> None:
        unique = uuid.uuid4().hex  # or two events that are alike were one member of the set
        rows = encode(events, self.schema)
        with _naming(self._url), self._writer.pipeline(transaction=True) as pipe:
            for number, (user, at, event) in enumerate(rows):
                pipe.zadd(self._user(user), {f"{unique}{number} {event}": at})
                pipe.xadd(f"{self._prefix}log", {"event": event})
            for user in {user for user, _, _ in rows}:
                pipe.zremrangebyrank(self._user(user), 0, -NEWEST_EVENTS - 1)
            pipe.execute()

    def write_log(self) -> int:
        """The same; machines that share the server each write a part of the events to their own directory.

        The server hands every event to one directory, and keeps it until that directory has it: a call after
        a kill gets the same events first. In a directory, one process at a time does it.
        """
        total, stream = 0, f"{self._prefix}log"
        with sole_writer(self.directory / "events"), _naming(self._url):
            remove_partials(self.directory / "events")
            _make_group(self._writer, stream)
            mine = self._reader_of_log()
            while batch := self._batch(mine, "0") or self._batch(mine, ">"):
                ids = [number.decode() for number, _ in batch]
                events = [fields[b"event"] for _, fields in batch if fields]  # None: deleted by somebody
                write_days(decode(events, self.schema), self.directory, ids[0])
                with self._writer.pipeline(transaction=True) as pipe:
                    pipe.xack(stream, _GROUP, *ids)
                    pipe.xdel(stream, *ids)
                    pipe.execute()
                total += len(events)
        return total

    def close(self) -> None:
        self._reader.close()
        self._writer.close()

    def _batch(self, mine: str, after: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """After "0": what this directory was handed before and did not write. After ">": new events."""
        found: Any = self._writer.xreadgroup(_GROUP, mine, {f"{self._prefix}log": after}, count=_BATCH)
        return found[0][1] if found else []

    def _reader_of_log(self) -> str:
        """The directory's own name, whatever machine it is mounted on."""
        file = self.directory / "events/.reader"
        if not file.exists():
            write_text(uuid.uuid4().hex, file)
        return file.read_text()

    def _user(self, user: str) -> str:
        return f"{self._prefix}user:{user}"


def check(url: str, name: str) -> None:
    """StateError where the server does not answer or refuses to write; ConfigError for a wrong URL."""
    client = _client(url, _WRITE_S)
    with _naming(url):
        _make_group(client, f"{_prefix(name)}log")
    client.close()


def masked(url: str) -> str:
    """The URL without user, password and options, for messages."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        port = None
    if port is None or "://" not in url or "@" in parts.path:  # what is the password there?
        return "(not shown)"
    secret = "***@" if "@" in parts.netloc else ""
    return f"{parts.scheme}://{secret}{parts.hostname or ''}{port}{parts.path}"


def _prefix(name: str) -> str:
    return f"recsys_dist:{name}:"


def _client(url: str, timeout_s: float) -> redis.Redis:
    """Connects when it is first used, and anew after a failure; nothing is sent twice."""
    scheme, _, rest = url.partition("://")
    wrong = f"state_url {masked(url)!r} is not an address of a Redis or Valkey server, such as redis://host:6379/0"
    if scheme not in _SCHEMES:
        known = ", ".join(f"{name}://" for name in _SCHEMES)
        raise ConfigError(f"{wrong}; it begins with one of {known}")
    try:
        made = redis.Redis.from_url(
            f"{_SCHEMES[scheme]}://{rest}",
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            protocol=2,  # 3 sends the password in a command that old servers repeat in their error
        )
        made.connection_pool.make_connection()  # not connected yet: refuses wrong options
    except (ValueError, TypeError):
        raise ConfigError(f"{wrong}; its port or one of its options is wrong") from None
    return made


def _make_group(client: redis.Redis, stream: str) -> None:
    """From the stream's beginning; anew where a server came back without it."""
    try:
        client.xgroup_create(stream, _GROUP, id="0", mkstream=True)
    except ResponseError as error:
        if not str(error).startswith("BUSYGROUP"):
            raise


@contextmanager
def _naming(url: str) -> Iterator[None]:
    try:
        yield
    except RedisError as error:
        reason = str(error).rpartition("of pipeline caused error: ")[2]  # before it stand the user's events
        raise StateError(
            f"the users' state at {masked(url)} cannot be used: {reason}; see that the server runs, that it "
            "may be written to, and that state_url has its address and password"
        ) from None
