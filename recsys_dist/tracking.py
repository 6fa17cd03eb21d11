"""Every run in MLflow: `open_run` begins or goes on with one, `deliver_pending` sends what was missed.

    run = tracking.open_run(TrackingConfig(), out, "ranking")  # starts a thread; never waits for a server
    run.record.config(cfg.model_dump(mode="json"))             # outbox.Recorder: all there is to tell
    run.record.metrics({"valid/auc": 0.74}, step=3)
    delivery = run.close("FINISHED")                           # waits a little; says what is still unsent

Records go to a local file first. The thread sends them in order and remembers how far it came; what a dead
server missed is sent by the same thread once it answers, by the next run of the same name, or by
`deliver_pending`. Sending twice is harmless: times and steps are the records' own.
"""

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import Field, field_validator

from recsys_dist.config import Config
from recsys_dist.errors import ConfigError
from recsys_dist.outbox import (
    Outbox,
    Recorder,
    State,
    Status,
    load_state,
    of_known_scheme,
    try_lock,
    without_credentials,
)
from recsys_dist.usage import UsageSampler

log = logging.getLogger(__name__)

EVERY_S = 1.0
LONGEST_PAUSE_S = 60.0  # between tries of a server that is down
FINAL_WAIT_S = 60.0  # a dead server fails within request_timeout_s; this bounds one that drips


class TrackingConfig(Config):
    """Where runs are tracked. Credentials go into MLFLOW_TRACKING_USERNAME, _PASSWORD or _TOKEN."""

    uri: str | None = Field(None, description="default: sqlite:///OUT/mlflow.db with artifacts beside it")
    experiment: str = Field("recsys_dist", min_length=1, max_length=500)
    request_timeout_s: int = Field(5, ge=1, le=600, description="of one call to the server")
    system_metrics_every_s: float = Field(10.0, gt=0)

    @field_validator("uri")
    @classmethod
    def _known_scheme(cls, uri: str | None) -> str | None:
        return uri if uri is None else of_known_scheme(uri)


@dataclass(frozen=True)
class Delivery:
    """How far a run's records came: `trouble` says why `waiting_records` are still on this machine."""

    name: str
    run_id: str | None
    waiting_records: int
    trouble: str | None


class Run:
    """An open run: `record` takes the news, a thread delivers them. Made by `open_run`, used as a context."""

    def __init__(self, outbox: Outbox, sampler: UsageSampler, lock: int, request_timeout_s: int) -> None:
        self.record = outbox.recorder
        self._outbox, self._sampler, self._locks = outbox, sampler, [lock]
        self._request_timeout_s = request_timeout_s
        self._children: list[Outbox] = []
        self._trouble: str | None = None
        self._delivery: Delivery | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="tracking", daemon=True)
        self._thread.start()

    @property
    def run_id(self) -> str | None:
        """MLflow's id, None until the server has been reached once."""
        return self._outbox.state.run_id

    @property
    def uri(self) -> str:
        """The tracking server's address without credentials."""
        return without_credentials(self._outbox.state.uri)

    @property
    def peak_rss_bytes(self) -> int:
        """The most memory that this process and its descendants held at once so far."""
        return self._sampler.peak_rss_bytes

    def child(self, name: str) -> Recorder:
        """Begin a run nested under this one, or go on with it; this run's thread delivers it too.

        Say with `status` how it ended; one that is still running when this run closes ends like it.
        """
        mine = self._outbox.state
        outbox, lock = _open(self._outbox.directory.parent / name, mine.uri, mine.experiment, mine.name)
        outbox.recorder.status("RUNNING")
        self._locks.append(lock)
        self._children.append(outbox)
        return outbox.recorder

    def close(self, status: Status = "FINISHED") -> Delivery:
        """Record the end, try once more to deliver, and tell what is left. Never raises for a server.

        Only the first call ends the run; the context's own finds it closed.
        """
        if self._delivery is None:
            self._sampler.stop()
            try:
                self.record.status(status)
                for child in self._children:
                    if child.recorder.last_status() == "RUNNING":
                        child.recorder.status(status)
            except OSError as error:  # what stopped the run, such as a full disk, is on its way up
                log.warning("the end of run %r is not recorded: %s", self._outbox.state.name, error)
            self._closing.set()
            self._thread.join(FINAL_WAIT_S)
            self._delivery = _delivery(self._outbox, self._trouble)
            waiting = sum(child.waiting_records() for child in self._children)
            self._delivery = replace(self._delivery, waiting_records=self._delivery.waiting_records + waiting)
            for lock in self._locks:
                os.close(lock)
        return self._delivery

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("KILLED" if issubclass(kind, KeyboardInterrupt) else "FAILED")

    def _loop(self) -> None:
        pause_s, closing = EVERY_S, False
        while not closing:
            closing = self._closing.wait(pause_s)
            trouble = _deliver([self._outbox, *self._children], self._request_timeout_s)  # parents first
            if trouble is not None and self._trouble is None:
                log.warning("%s takes no records: %s; the run goes on", self.uri, trouble)
            self._trouble = trouble
            pause_s = EVERY_S if trouble is None else min(2 * pause_s, LONGEST_PAUSE_S)


def _deliver(outboxes: Sequence[Outbox], request_timeout_s: int) -> str | None:
    """Send what waits until something is in the way, and say what that is."""
    from recsys_dist import delivery  # with MLflow: a second, which a run's thread has while Ray starts

    delivery.prepare_mlflow(request_timeout_s)
    return next(filter(None, map(delivery.deliver, outboxes)), None)


def open_run(cfg: TrackingConfig, out: Path, name: str) -> Run:
    """Start tracking the run `name` of `out`, or go on with it where it was begun before.

    Its records lie in `out`/tracking/`name`. Returns at once, whether the server answers or not.
    Raises ConfigError where another living process writes the same run.
    """
    uri = cfg.uri or f"sqlite:///{out.resolve() / 'mlflow.db'}"
    outbox, lock = _open((out / "tracking" / name).resolve(), uri, cfg.experiment, parent=None)
    outbox.recorder.status("RUNNING")
    outbox.recorder.tags(provenance())
    sampler = UsageSampler(outbox.recorder, cfg.system_metrics_every_s)
    return Run(outbox, sampler, lock, cfg.request_timeout_s)


def _open(directory: Path, uri: str, experiment: str, parent: str | None) -> tuple[Outbox, int]:
    """The outbox of a run's directory, and the lock on it; what was sent to another server is sent again."""
    directory.mkdir(parents=True, exist_ok=True)
    lock = try_lock(directory / "lock")
    if lock is None:
        raise ConfigError(
            f"run {directory.name!r} in {str(directory.parent.parent)!r} is being written by another "
            "process; wait for it or choose another --out"
        )
    state = load_state(directory)
    if state is None:
        state = State(uri, experiment, directory.name, token=os.urandom(16).hex(), parent=parent)
    elif (state.uri, state.experiment) != (uri, experiment):  # another server hears it all from the start
        state = replace(state, uri=uri, experiment=experiment, run_id=None, delivered_bytes=0)
    outbox = Outbox(directory, state)
    outbox.save(state)
    return outbox, lock


def deliver_pending(out: Path, request_timeout_s: int = 5) -> list[Delivery]:
    """Send what earlier runs of `out` could not; returns those that had something to send.

    A run whose driver died without a word is marked KILLED. Runs that a living process writes are left
    alone, and a server that fails once is not asked again in this call.
    """
    deliveries: list[Delivery] = []
    failed: dict[str, str] = {}
    for path in sorted((out / "tracking").resolve().glob("*/state.json")):
        state, lock = load_state(path.parent), try_lock(path.parent / "lock")
        if state is not None and lock is not None:
            outbox = Outbox(path.parent, state)
            if outbox.recorder.last_status() == "RUNNING":
                outbox.recorder.status("KILLED")
            if outbox.waiting_records():
                if (trouble := failed.get(state.uri)) is None:
                    trouble = _deliver([outbox], request_timeout_s)
                if trouble is not None:
                    failed[state.uri] = trouble
                deliveries.append(_delivery(outbox, trouble))
        if lock is not None:
            os.close(lock)
    return deliveries


def _delivery(outbox: Outbox, trouble: str | None) -> Delivery:
    return Delivery(outbox.state.name, outbox.state.run_id, outbox.waiting_records(), trouble)


def provenance() -> dict[str, str]:
    """Tags that say which code ran: git commit, whether the tree was changed, the command."""
    root = Path(__file__).resolve().parent.parent
    command = without_credentials(" ".join(sys.argv))
    tags = {"mlflow.source.name": command, "mlflow.source.type": "LOCAL"}
    if _git(root, "rev-parse", "--show-toplevel") == str(root):
        tags["mlflow.source.git.commit"] = _git(root, "rev-parse", "HEAD") or "none yet"
        tags["git.changed_files"] = str(len(_git(root, "status", "--porcelain").splitlines()))
    return tags


def _git(root: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", root, *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
