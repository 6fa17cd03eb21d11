"""The only mlflow: sends an outbox's records to a tracking server, in order, once.

Sending a record twice is harmless (times and steps are the record's own, and MLflow keeps equal points
once), so the position is saved after each call that succeeded and nothing is lost or doubled by a kill.
"""

import fcntl
import json
import logging
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlflow.telemetry
from mlflow.entities import Dataset, DatasetInput, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from mlflow.utils.validation import (
    MAX_ENTITY_KEY_LENGTH,
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_VAL_LENGTH,
    MAX_PARAMS_TAGS_PER_BATCH,
    MAX_TAG_VAL_LENGTH,
)
from sqlalchemy.exc import SQLAlchemyError

from recsys_dist.outbox import Outbox, load_state, without_credentials

log = logging.getLogger(__name__)

REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST")  # answers that no later try would change
# requests' errors are OSErrors; a database's client that is not installed is an ImportError
TROUBLE = (MlflowException, SQLAlchemyError, OSError, ImportError)
OUTBOX_TAG = "recsys_dist.outbox"

Entity = Metric | Param | RunTag


def deliver(outbox: Outbox) -> str | None:
    """Send all that waits, saving the position after every call that the server accepted.

    Says in a line what was in the way, if anything was: the rest waits for another time.
    """
    try:
        if outbox.waiting_records():
            with one_writer(outbox.state.uri):
                Sender(outbox, MlflowClient(tracking_uri=outbox.state.uri)).send()
    except TROUBLE as error:
        return short_reason(error)
    return None


@dataclass(frozen=True)
class Sender:
    """One delivery of an outbox."""

    outbox: Outbox
    client: MlflowClient

    def send(self) -> None:
        """Raises one of TROUBLE where the server does not take it."""
        try:
            self._send_waiting(self._run_id())
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            self._save(run_id=None, delivered_bytes=0)  # the store was replaced: the outbox has everything
            self._send_waiting(self._run_id())

    def _save(self, **changes: Any) -> None:
        self.outbox.save(replace(self.outbox.state, **changes))

    def _run_id(self) -> str:
        state = self.outbox.state
        if state.run_id is not None:
            return state.run_id
        experiment = experiment_id(self.client, state.uri, state.experiment)
        found = self.client.search_runs([experiment], f"tags.`{OUTBOX_TAG}` = '{state.token}'")
        if found:
            run_id = str(found[0].info.run_id)
        else:
            started_ms = next(record["time_ms"] for record, _ in self.outbox.recorder.read())
            tags = {OUTBOX_TAG: state.token, **self._nesting()}
            run_id = str(self.client.create_run(experiment, started_ms, tags, state.name).info.run_id)
        self._save(run_id=run_id)
        return run_id

    def _nesting(self) -> dict[str, str]:
        parent = self.outbox.state.parent
        if parent is None:
            return {}
        state = load_state(self.outbox.directory.parent / parent)
        if state is None or state.run_id is None:
            raise OSError(f"run {parent!r}, which it is nested under, is not delivered yet")
        return {MLFLOW_PARENT_RUN_ID: state.run_id}

    def _send_waiting(self, run_id: str) -> None:
        batch: list[Entity] = []
        reached = self.outbox.state.delivered_bytes
        for record, end in self.outbox.waiting():
            for entity in _entities(record):
                if _full(batch):
                    self._send_batch(run_id, batch)
                    self._save(delivered_bytes=reached)  # this record is sent again: harmless
                    batch = []
                batch.append(entity)
            if record["kind"] not in ("metrics", "params", "tags"):
                self._send_batch(run_id, batch)
                batch = []
                self._send_other(run_id, record)
                self._save(delivered_bytes=end)
            reached = end
        self._send_batch(run_id, batch)
        self._save(delivered_bytes=reached)

    def _send_batch(self, run_id: str, batch: list[Entity]) -> None:
        if not batch:
            return
        try:
            self.client.log_batch(
                run_id,
                metrics=[entity for entity in batch if isinstance(entity, Metric)],
                params=[entity for entity in batch if isinstance(entity, Param)],
                tags=[entity for entity in batch if isinstance(entity, RunTag)],
            )
        except MlflowException as error:
            if error.error_code not in REFUSED:
                raise
            if len(batch) == 1:
                log.warning("MLflow refuses %s: %s", batch[0].key, short_reason(error))
            else:  # find the one that spoils the batch
                half = len(batch) // 2
                self._send_batch(run_id, batch[:half])
                self._send_batch(run_id, batch[half:])

    def _send_other(self, run_id: str, record: dict[str, Any]) -> None:
        try:
            match record["kind"]:
                case "status" if record["status"] == "RUNNING":
                    self.client.update_run(run_id, status="RUNNING")
                case "status":
                    self.client.set_terminated(run_id, record["status"], end_time=record["time_ms"])
                case "artifact":
                    path = self.outbox.directory / record["path"]
                    self.client.log_artifact(run_id, str(path), record["folder"] or None)
                case "data":
                    source = json.dumps({"uri": record["source"]})
                    dataset = Dataset(record["name"], record["digest"][:36], "local", source)
                    self.client.log_inputs(run_id, [DatasetInput(dataset)])
                case kind:
                    log.warning("a record of kind %r is not known to this version; skipped", kind)
        except FileNotFoundError as error:
            log.warning("artifact was removed before it could be sent: %s", error.filename)
        except MlflowException as error:
            if error.error_code not in REFUSED:
                raise
            log.warning("MLflow refuses %s: %s", record, short_reason(error))


def prepare_mlflow(request_timeout_s: int) -> None:
    """Short calls, no telemetry, no migration chatter. By default a dead server blocks a call for 247 s."""
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(request_timeout_s)
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "0"  # the outbox is the retry
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    mlflow.telemetry.set_telemetry_client()  # type: ignore[no-untyped-call]
    for name in ("alembic", "mlflow.tracking"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # its errors come as exceptions too


def short_reason(error: BaseException) -> str:
    """The root cause in one line, without what a URI may hold of passwords."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    first, *more = str(error).strip().splitlines() or [""]
    said = f"{first} {more[0]}" if more and first.endswith(":") else first  # the cause is on the next line
    return without_credentials(f"{type(error).__name__}: {said[:300]}")


def _entities(record: dict[str, Any]) -> list[Entity]:
    time_ms, values = record["time_ms"], record.get("values", {})
    match record["kind"]:
        case "metrics":
            return [Metric(_key(k), v, time_ms, record["step"]) for k, v in values.items()]
        case "params":
            return [Param(_key(k), _cut(v, MAX_PARAM_VAL_LENGTH)) for k, v in values.items()]
        case "tags":
            return [RunTag(_key(k), _cut(v, MAX_TAG_VAL_LENGTH)) for k, v in values.items()]
        case _:
            return []


def _full(batch: list[Entity]) -> bool:
    """MLflow takes 1,000 metrics, 100 parameters, 100 tags and 1 MB at once."""
    texts = sum(1 for entity in batch if not isinstance(entity, Metric))
    return len(batch) >= MAX_METRICS_PER_BATCH or texts >= MAX_PARAMS_TAGS_PER_BATCH


def _key(name: str) -> str:
    """MLflow's alphabet for names: `recall@50` becomes `recall_at_50`."""
    return re.sub(r"[^/\w.\- :]", "_", name.replace("@", "_at_"))[:MAX_ENTITY_KEY_LENGTH]


def _cut(text: str, length: int) -> str:
    """MLflow's limit; the whole text stands in the run's config.yaml."""
    return text if len(text) <= length else text[: length - 1] + "…"


def experiment_id(client: MlflowClient, uri: str, name: str) -> str:
    """The experiment of that name, made where there is none; beside an SQLite file its artifacts are too."""
    found = client.get_experiment_by_name(name)
    if found is not None:
        return str(found.experiment_id)
    database = sqlite_path(uri)
    place = (database.parent / "mlartifacts").as_uri() if database else None  # a server has its own
    try:
        return client.create_experiment(name, artifact_location=place)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run was quicker
            raise
        return experiment_id(client, uri, name)


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite URI, None of another."""
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


@contextmanager
def one_writer(uri: str) -> Iterator[None]:
    """SQLite has one writer at a time here: first use by two at once breaks its tables (measured)."""
    database = sqlite_path(uri)
    if database is None:
        yield
        return
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not database.exists():
            _make(database)
        yield


def _make(database: Path) -> None:
    """Have MLflow make its tables under another name: half of them, after a kill, it would never complete."""
    for left in database.parent.glob(f"{database.name}.*.new*"):
        left.unlink()
    fresh = database.with_name(f"{database.name}.{uuid.uuid4().hex[:8]}.new")
    MlflowClient(tracking_uri=f"sqlite:///{fresh}").search_experiments()
    fresh.rename(database)
