import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient

from recsys_dist import delivery
from recsys_dist.delivery import one_writer
from recsys_dist.errors import ConfigError
from recsys_dist.outbox import Recorder, load_state
from recsys_dist.tracking import TrackingConfig, deliver_pending, open_run

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables: making them takes seconds, copying does not."""
    place = tmp_path_factory.mktemp("store") / "mlflow.db"
    (place.parent / "mlflow.db.0a1b2c3d.new").write_bytes(b"half of the tables: its maker was killed")
    with one_writer(f"sqlite:///{place}"):
        assert sorted(file.name for file in place.parent.iterdir()) == ["mlflow.db", "mlflow.lock"]
    return place


@pytest.fixture
def out(tmp_path: Path, empty_store: Path) -> Path:
    shutil.copyfile(empty_store, tmp_path / "mlflow.db")
    return tmp_path


def fetch(out: Path, run_id: str, uri: str | None = None) -> tuple[MlflowClient, MlflowRun]:
    client = MlflowClient(tracking_uri=uri or f"sqlite:///{out.resolve() / 'mlflow.db'}")
    return client, client.get_run(run_id)


def test_a_run_arrives_whole_in_sqlite(out: Path) -> None:
    plot = out / "curve.svg"
    plot.write_text("<svg/>")
    run = open_run(TrackingConfig(system_metrics_every_s=0.1), out, "ranking")
    run.record.config({"train": {"epochs": 2, "lr": 0.1}, "model": {"widths": [8, 4]}})
    for epoch in range(3):
        run.record.metrics({"valid/auc": 0.5 + epoch / 10, "recall@50": 0.1}, step=epoch)
    run.record.data("kuairand", "0123abcd", "events/")
    run.record.checkpoint("checkpoints/epoch-2")
    run.record.artifact(plot, "plots")
    plot.unlink()  # the outbox kept its own copy
    wait_until(lambda: "system/" in run.record.path.read_text())
    delivery = run.close()

    assert (delivery.waiting_records, delivery.trouble) == (0, None)
    client, stored = fetch(out, str(delivery.run_id))
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"train.epochs": "2", "train.lr": "0.1", "model.widths": "[8, 4]"}
    curve = client.get_metric_history(stored.info.run_id, "valid/auc")
    assert [(point.step, point.value) for point in curve] == [(0, 0.5), (1, 0.6), (2, 0.7)]
    assert stored.data.metrics["recall_at_50"] == 0.1
    assert stored.data.metrics["system/process_tree_rss_megabytes"] > 1
    assert stored.data.tags["checkpoint"] == "checkpoints/epoch-2"
    assert stored.inputs.dataset_inputs[0].dataset.digest == "0123abcd"
    assert {file.path for file in client.list_artifacts(stored.info.run_id)} == {"config.yaml", "plots"}
    assert client.list_artifacts(stored.info.run_id, "plots")[0].path == "plots/curve.svg"
    assert stored.data.tags["mlflow.source.git.commit"] == git_head()
    assert run.peak_rss_bytes > 50_000_000


def git_head() -> str:
    done = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(out: Path) -> None:
    with open_run(TrackingConfig(), out, "ranking") as run:
        run.record.config({"epochs": 2})
        run.record.metrics({"loss": 0.9}, step=0)
    with open_run(TrackingConfig(), out, "ranking") as again:
        again.record.config({"epochs": 3})
        again.record.metrics({"loss": 0.8}, step=1)
    assert again.run_id == run.run_id
    client, stored = fetch(out, str(run.run_id))
    assert [point.value for point in client.get_metric_history(stored.info.run_id, "loss")] == [0.9, 0.8]
    assert stored.data.params == {"epochs": "2"}
    assert stored.data.tags["resumed.epochs"] == "3"


def test_many_records_and_a_refused_one(out: Path) -> None:
    run = open_run(TrackingConfig(), out, "big")
    run.record.config({f"setting_{i}": i for i in range(250)} | {"long": "x" * 9_000})
    for step in range(1_200):
        run.record.metrics({"a": step, "b": -step}, step)
    run.record.metrics({"bad//name": 1.0, "good": float("nan")}, 0)
    delivery = run.close()
    assert delivery.waiting_records == 0
    client, stored = fetch(out, str(delivery.run_id))
    assert len(stored.data.params) == 251
    assert len(stored.data.params["long"]) == 6_000
    assert len(client.get_metric_history(stored.info.run_id, "a")) == 1_200
    assert "good" in stored.data.metrics  # the name that MLflow refuses took nothing else with it


def test_delivering_twice_changes_nothing(out: Path) -> None:
    with open_run(TrackingConfig(), out, "run") as run:
        run.record.metrics({"loss": 0.5}, step=7)
        run.record.data("log", "abc", "x")
    state_path = out / "tracking" / "run" / "state.json"
    state = json.loads(state_path.read_text())
    forgotten = {**state, "delivered_bytes": 0, "run_id": None}  # killed before the position was saved
    state_path.write_text(json.dumps(forgotten))
    [delivery] = deliver_pending(out)
    assert delivery.run_id == state["run_id"]
    client, stored = fetch(out, state["run_id"])
    assert len(client.get_metric_history(stored.info.run_id, "loss")) == 1
    assert len(stored.inputs.dataset_inputs) == 1


def test_another_store_hears_everything_from_the_start(out: Path) -> None:
    with open_run(TrackingConfig(), out, "run") as run:
        run.record.metrics({"loss": 0.5})
    other = f"sqlite:///{shutil.copyfile(out / 'mlflow.db', out / 'other.db')}"
    with open_run(TrackingConfig(uri=other, experiment="moved"), out, "run") as moved:
        moved.record.metrics({"loss": 0.4}, step=1)
    client, _ = fetch(out, str(moved.run_id), other)
    assert [point.value for point in client.get_metric_history(str(moved.run_id), "loss")] == [0.5, 0.4]


def test_a_store_that_lost_the_run_hears_everything_again(out: Path, empty_store: Path) -> None:
    with open_run(TrackingConfig(), out, "run") as run:
        run.record.metrics({"loss": 0.5})
    lost = f"sqlite:///{shutil.copyfile(empty_store, out / 'empty.db')}"
    state_path = out / "tracking" / "run" / "state.json"
    state_path.write_text(json.dumps({**json.loads(state_path.read_text()), "uri": lost}))
    run.record.metrics({"loss": 0.4}, step=1)
    [delivery] = deliver_pending(out)
    assert delivery.run_id != run.run_id
    client, _ = fetch(out, str(delivery.run_id), lost)
    assert [point.value for point in client.get_metric_history(str(delivery.run_id), "loss")] == [0.5, 0.4]


def test_torn_lines_are_skipped(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "box")
    recorder.metrics({"a": 1.0})
    with recorder.path.open("ab") as file:
        file.write(b'\n{"kind": "metr')  # killed here
    assert [record["values"] for record, _ in recorder.read()] == [{"a": 1.0}]
    recorder.metrics({"a": 2.0})
    assert [record["values"] for record, _ in recorder.read()] == [{"a": 1.0}, {"a": 2.0}]


def test_what_is_told_again_as_it_was_is_recorded_once(tmp_path: Path) -> None:
    record, plot = Recorder(tmp_path / "run"), tmp_path / "curve.svg"
    for shown in ("<svg/>", "<svg/>", "<svg>more</svg>"):
        plot.write_text(shown)
        record.artifact(plot, "plots")
        record.config({"epochs": 2})
    kept = [line for line, _ in record.read() if line["kind"] == "artifact"]
    assert [Path(line["path"]).name for line in kept] == ["curve.svg", "config.yaml", "curve.svg"]
    assert [(record.directory / line["path"]).read_text() for line in kept[::2]] == ["<svg/>", shown]


def test_a_recorder_travels_to_another_process(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "box")
    code = (
        "import pickle, sys; pickle.load(sys.stdin.buffer).metrics({'a': 3.0}, 1)\n"
        "print('mlflow' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(recorder), capture_output=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == b"False"
    assert [record["values"] for record, _ in recorder.read()] == [{"a": 3.0}]


def test_closing_inside_the_context_ends_the_run_once(out: Path) -> None:
    with open_run(TrackingConfig(), out, "run") as run:
        delivery = run.close("FAILED")
    assert run.close() is delivery
    assert [r["status"] for r, _ in run.record.read() if r["kind"] == "status"] == ["RUNNING", "FAILED"]


def test_nested_runs_arrive_under_their_parent_through_one_thread(out: Path) -> None:
    with open_run(TrackingConfig(), out, "sweep") as run:
        children = [run.child(f"sweep-{number}") for number in range(3)]
        for number, child in enumerate(children):
            child.config({"lr": number})
            child.metrics({"auc": 0.5 + number / 10, "loss": 1.0}, step=number)
        children[0].status("FINISHED")
        children[1].status("FAILED")
        with pytest.raises(ConfigError, match="written by another"):
            run.child("sweep-0")
        assert deliver_pending(out) == [], "what is being written is left alone"
        delivery = run.close()
    assert delivery.waiting_records == 0
    client, parent = fetch(out, str(delivery.run_id))
    assert "mlflow.parentRunId" not in parent.data.tags
    found = client.search_runs(
        [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
    )
    ended = {run.info.run_name: (run.info.status, run.data.metrics["auc"]) for run in found}
    assert ended == {"sweep-0": ("FINISHED", 0.5), "sweep-1": ("FAILED", 0.6), "sweep-2": ("FINISHED", 0.7)}
    with open_run(TrackingConfig(), out, "sweep") as run:
        run.child("sweep-2").metrics({"auc": 0.9}, step=9)
    assert len(client.search_runs([parent.info.experiment_id])) == 4, "none was begun twice"
    assert client.get_run(load_state(out / "tracking/sweep-2").run_id).data.metrics["auc"] == 0.9


def test_an_error_and_ctrl_c_end_the_run_in_their_own_way(out: Path) -> None:
    for error, status in ((RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")):
        with pytest.raises(error), open_run(TrackingConfig(), out, status) as run:
            raise error
        assert run.record.last_status() == status


def test_one_writer_per_run(out: Path) -> None:
    with open_run(TrackingConfig(), out, "run"), pytest.raises(ConfigError, match="another process"):
        open_run(TrackingConfig(), out, "run")


def test_passwords_stay_out_of_records(tmp_path: Path) -> None:
    run = open_run(TrackingConfig(uri="http://me:secret@127.0.0.1:9/x"), tmp_path, "run")
    run.record.config({"tracking": {"uri": "http://me:secret@127.0.0.1:9/x"}})
    delivery = run.close()
    assert run.uri == "http://127.0.0.1:9/x"
    assert "secret" not in str(delivery)
    assert "secret" not in run.record.path.read_text()
    assert all("secret" not in p.read_text() for p in run.record.directory.rglob("*.yaml"))
    assert (run.record.directory / "state.json").stat().st_mode & 0o077 == 0


def test_an_unusable_uri_is_refused_before_anything_starts() -> None:
    with pytest.raises(ConfigError, match=r"'uri'.*sqlite"):
        TrackingConfig.parse({"uri": "runs/mlflow"})


@pytest.mark.e2e
def test_two_first_uses_of_one_database_at_once(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from recsys_dist.tracking import *\n"
        "run = open_run(TrackingConfig(), Path(sys.argv[1]), sys.argv[2]); run.record.metrics({'a': 1.0})\n"
        "assert run.close().waiting_records == 0"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, tmp_path, name], cwd=ROOT) for name in ("a", "b")]
    assert [process.wait(120) for process in both] == [0, 0]
    states = [load_state(tmp_path / "tracking" / name) for name in ("a", "b")]
    assert len({state.run_id for state in states if state}) == 2


class Server:
    """A real MLflow server on a free loopback port, started and ended by the test."""

    def __init__(self, home: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.uri = f"http://127.0.0.1:{self.port}"
        self._home = home
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self._home}/server.db"]
        command += ["--artifacts-destination", str(self._home / "artifacts")]
        quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with (self._home / "server.log").open("ab") as out:
            self._process = subprocess.Popen(
                command, env={**os.environ, **quiet}, stdout=out, stderr=out, start_new_session=True
            )
        deadline = time.monotonic() + 90
        while not self._healthy():
            assert time.monotonic() < deadline, (self._home / "server.log").read_text()
            time.sleep(0.2)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)  # its own group, made above
            self._process.wait()
            self._process = None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    home = tmp_path / "server"
    home.mkdir()
    server = Server(home)
    yield server
    server.kill()


@pytest.mark.e2e
def test_a_server_that_is_down_delays_nothing_and_hears_everything_later(
    tmp_path: Path, server: Server
) -> None:
    cfg = TrackingConfig(uri=server.uri)
    began = time.monotonic()
    run = open_run(cfg, tmp_path, "run")
    run.record.config({"epochs": 4})
    run.record.metrics({"loss": 0.9}, step=0)
    assert time.monotonic() - began < 5
    delivery = run.close()
    assert time.monotonic() - began < 20
    assert delivery.waiting_records >= 4
    assert "refused" in str(delivery.trouble).lower()

    server.start()
    [sent] = deliver_pending(tmp_path)
    assert (sent.waiting_records, sent.trouble) == (0, None)
    run = open_run(cfg, tmp_path, "run")
    run.record.metrics({"loss": 0.8}, step=1)
    wait_until(lambda: run._outbox.waiting_records() == 0)
    server.kill()  # in the middle of the run
    run.record.metrics({"loss": 0.7}, step=2)
    run.record.text("done", "summary.txt")
    wait_until(lambda: run._trouble is not None)
    server.start()
    wait_until(lambda: run._outbox.waiting_records() == 0)
    assert run.close().waiting_records == 0

    client, stored = fetch(tmp_path, str(sent.run_id), server.uri)
    curve = client.get_metric_history(stored.info.run_id, "loss")
    assert [(point.step, point.value) for point in curve] == [(0, 0.9), (1, 0.8), (2, 0.7)]
    assert stored.info.status == "FINISHED"
    assert {file.path for file in client.list_artifacts(stored.info.run_id)} == {"config.yaml", "summary.txt"}


def test_a_server_that_never_answers_costs_seconds(tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(50)  # accepts, and says nothing
        uri = f"http://127.0.0.1:{silent.getsockname()[1]}"
        began = time.monotonic()
        run = open_run(TrackingConfig(uri=uri, request_timeout_s=1), tmp_path, "run")
        run.record.metrics({"loss": 0.9})
        delivery = run.close()
        assert time.monotonic() - began < 10
    assert delivery.waiting_records > 0
    assert delivery.trouble is not None


@pytest.mark.e2e
def test_a_killed_driver_loses_nothing(out: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from recsys_dist.tracking import *\n"
        "run = open_run(TrackingConfig(), Path(sys.argv[1]), 'run')\n"
        "for step in range(50): run.record.metrics({'loss': 1.0 / (1 + step)}, step)\n"
        "os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, out], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    [delivery] = deliver_pending(out)
    client, stored = fetch(out, str(delivery.run_id))
    assert stored.info.status == "KILLED"
    assert len(client.get_metric_history(stored.info.run_id, "loss")) == 50
    assert deliver_pending(out) == []


def wait_until(condition: object, timeout_s: float = 90) -> None:
    assert callable(condition)
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_database_whose_client_is_not_installed_is_a_reason_to_wait(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def client(**_: object) -> None:
        raise ModuleNotFoundError("No module named 'psycopg'")

    monkeypatch.setattr(delivery, "MlflowClient", client)
    with open_run(TrackingConfig(), out, "run") as run:
        run.record.metrics({"auc": 0.7})
        found = run.close()
    assert found.waiting_records > 0 and found.trouble is not None and "psycopg" in found.trouble
    [later] = deliver_pending(out)
    assert later.waiting_records == found.waiting_records
