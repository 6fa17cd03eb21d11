"""What a run has to tell, kept in a local file until it is delivered. No mlflow here.

A `Recorder` is only a path: it pickles, so that whichever process has news appends them, while one process
alone, the driver, delivers its `Outbox`.
"""

import fcntl
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

log = logging.getLogger(__name__)

SCHEMES = ("sqlite", "http", "https", "postgresql", "mysql", "mssql", "databricks")  # of a tracking URI
Status = str  # RUNNING, FINISHED, FAILED or KILLED: MLflow's words


@dataclass(frozen=True)
class Recorder:
    """Appends records to `directory`/outbox.jsonl; each survives the death of this process at once."""

    directory: Path

    @property
    def path(self) -> Path:
        return self.directory / "outbox.jsonl"

    def config(self, values: Mapping[str, Any]) -> None:
        """The whole configuration, as flat parameters and as a file that `--config` takes.

        Parameters are written once (MLflow's rule): where a resumed run differs, a tag says so.
        """
        flat = {key: without_credentials(text) for key, text in flatten(values).items()}
        before = self._known_params()
        new = {key: value for key, value in flat.items() if key not in before}
        changed = {f"resumed.{k}": v for k, v in flat.items() if k in before and before[k] != v}
        self._append({"kind": "params", "values": new})
        self.tags(changed)
        self.text(without_credentials(yaml.safe_dump(dict(values), sort_keys=False)), "config.yaml")

    def tags(self, values: Mapping[str, str]) -> None:
        self._append({"kind": "tags", "values": dict(values)})

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        """One report: every value at the same step and moment, sent as one batch."""
        self._append({"kind": "metrics", "step": step, "values": {k: float(v) for k, v in values.items()}})

    def data(self, name: str, digest: str, source: str) -> None:
        """Which data was used: shown as the run's data set."""
        self._append({"kind": "data", "name": name, "digest": digest, "source": source})

    def checkpoint(self, place: str | Path) -> None:
        """Where the best checkpoint lies (it is not uploaded: it can be large and is never overwritten)."""
        self.tags({"checkpoint": str(place)})

    def artifact(self, path: Path, folder: str = "") -> None:
        """A file to upload, unless it was before, as it is. A copy is kept: `path` may change or vanish."""
        self._attach(path.name, path.read_bytes(), folder)

    def text(self, text: str, name: str, folder: str = "") -> None:
        """A text file to upload under `name`, unless it was before, as it is."""
        self._attach(name, text.encode(), folder)

    def status(self, status: Status) -> None:
        self._append({"kind": "status", "status": status})

    def last_status(self) -> Status | None:
        """The newest status recorded, None in a fresh outbox."""
        found = [record["status"] for record, _ in self.read() if record["kind"] == "status"]
        return found[-1] if found else None

    def read(self, offset: int = 0) -> Iterator[tuple[dict[str, Any], int]]:
        """Complete records from byte `offset` on, each with the byte after it; torn lines are skipped."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                if not line.endswith(b"\n"):
                    return  # being written at this moment
                if line.strip():
                    record = _parse(line, self.path)
                    if record is not None:
                        yield record, offset

    def size_bytes(self) -> int:
        return self.path.stat().st_size if self.path.exists() else 0

    def _attach(self, name: str, content: bytes, folder: str) -> None:
        attached = (record for record, _ in self.read() if record["kind"] == "artifact")
        former = [
            self.directory / record["path"]
            for record in attached
            if (Path(record["path"]).name, record["folder"]) == (name, folder)
        ]
        if former and former[-1].exists() and former[-1].read_bytes() == content:
            return
        copy = self.directory / "files" / f"{time.time_ns()}" / name
        copy.parent.mkdir(parents=True)
        with _naming(copy):
            copy.write_bytes(content)
        self._append({"kind": "artifact", "path": str(copy.relative_to(self.directory)), "folder": folder})

    def _append(self, record: dict[str, Any]) -> None:
        if "values" in record and not record["values"]:
            return
        # The leading newline ends a line that a killed process or a full disk left torn.
        line = "\n" + json.dumps({"time_ms": time.time_ns() // 1_000_000, **record}) + "\n"
        self.directory.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            data = line.encode()
            while data:
                with _naming(self.path):
                    data = data[os.write(file, data) :]
        finally:
            os.close(file)

    def _known_params(self) -> dict[str, str]:
        known: dict[str, str] = {}
        for record, _ in self.read():
            if record["kind"] == "params":
                known.update(record["values"])
        return known


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as `a.b.c` -> text; lists and other leaves as JSON."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, default=str)
    return flat


def of_known_scheme(uri: str) -> str:
    """The URI; ValueError where MLflow could not use it."""
    if uri.split(":")[0].split("+")[0] not in SCHEMES:
        raise ValueError(
            f"expected a URI that starts with one of {', '.join(SCHEMES)}, as in sqlite:///a.db or http://a:5000"
        )
    return uri


def without_credentials(text: str) -> str:
    """`http://me:secret@host/x` -> `http://host/x`, wherever a URI stands in `text`."""
    return re.sub(r"(\w://)[^/@\s]+@", r"\1", text)


def _parse(line: bytes, path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        log.debug("%s: a torn record of %d bytes is skipped", path, len(line))  # told when it was torn
        return None
    assert isinstance(record, dict), f"{path}: {line[:80]!r} is no record"
    return record


@dataclass(frozen=True)
class State:
    """How far an outbox was delivered; `token` finds the MLflow run if its id was not yet written.

    parent  name of the run, beside this one, that it is nested under
    """

    uri: str
    experiment: str
    name: str
    token: str
    run_id: str | None = None
    delivered_bytes: int = 0
    parent: str | None = None

    def save(self, directory: Path) -> None:
        """Replace the saved state at once; only the owner may read it, for a URI can hold a password."""
        fresh = directory / "state.new"
        fresh.touch(mode=0o600)
        with _naming(fresh):
            fresh.write_text(json.dumps(asdict(self), indent=1))
        fresh.replace(directory / "state.json")


@dataclass
class Outbox:
    """The records of one run, and how far they were delivered."""

    directory: Path
    state: State

    @property
    def recorder(self) -> Recorder:
        return Recorder(self.directory)

    def waiting(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Records that are still to be delivered, each with the byte after it."""
        return self.recorder.read(self.state.delivered_bytes)

    def waiting_records(self) -> int:
        return sum(1 for _ in self.waiting())

    def save(self, state: State) -> None:
        state.save(self.directory)
        self.state = state


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which file it is that cannot be written, which the system does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def load_state(directory: Path) -> State | None:
    try:
        return State(**json.loads((directory / "state.json").read_text()))
    except FileNotFoundError:
        return None


def try_lock(path: Path) -> int | None:
    """A file descriptor that holds the lock until it is closed or the process ends, None where it is held."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock
