"""Training that goes wrong, really made to: what is lost, what is said, what is the same in the end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray

from jobs.ledger_model import trained_once
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import DataError, NonFiniteLossError, TrainError
from recsys_dist.train import storage, trainer
from recsys_dist.train.checkpoint import latest_valid, verify
from recsys_dist.train.progress import PROGRESS, read
from recsys_dist.train.settings import TrainConfig
from tests.train import prepared
from tests.train.runs import assert_calibrated, assert_same, config, weights

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_killed_within_an_epoch_it_goes_on_there_and_is_the_uninterrupted_run(data, tmp_path):
    """From changed rows; with dropout, and refitted and calibrated, alike."""
    cfg = config(data, model={"name": "mlp", "embedding_dim": 8, "hidden": [16], "dropout": 0.3})
    uninterrupted = trainer.fit(cfg, tmp_path / "a")
    often = cfg.override(["checkpoint_every_s=0", "checkpoint_increments=1"])
    run = start_and_kill(often, tmp_path / "b", "choose/step-00000000[4-9]-*")
    before = latest_valid(run / "choose").manifest
    assert before.epoch == 0 and 4 <= before.step < 14 and before.position.totals.rows == 64 * before.step
    assert before.base is not None
    assert not (run / "result.json").exists()
    resumed = trainer.fit(cfg, tmp_path / "b")
    assert_same(uninterrupted.checkpoint, resumed.checkpoint)
    assert resumed.checkpoint.parent.name == "refit"
    assert_calibrated(resumed.checkpoint, resumed.history[resumed.chosen_epoch - 1])
    for name in ("auc", "loss", "trained_rows"):
        found = [entry[name] for entry in resumed.history]
        assert found == [entry[name] for entry in uninterrupted.history], name
    told = [line for line, _ in read(run / PROGRESS) if (line["kind"], line["phase"]) == ("curve", "choose")]
    assert [line["step"] for line in told] == list(range(1, 29)), "the curve goes on, and tells nothing twice"
    assert not list(run.glob("choose/step-*")), "an epoch's end replaces what was saved within it"


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_rows_are_trained_once_when_fewer_workers_of_another_machine_go_on_within_an_epoch(data, tmp_path):
    """From a store, which is all that is left."""
    model = {"name": "jobs.ledger_model:Model", "shards": prepared.SPLITS["train"]}
    optimizer = {"deep": {"lr": 0.5}}
    store = {"checkpoints": f"file://{tmp_path}/store", "checkpoint_every_s": 0}
    cfg = config(data, model=model, epochs=1, refit=False, optimizer=optimizer, **store)
    run = start_and_kill(cfg, tmp_path / "lost", "choose/step-00000000[3-9]-*")
    before = latest_valid(storage.below(cfg.checkpoints, run) / "choose").manifest
    assert before.workers == 2
    result = trainer.fit(cfg.override(["num_workers=0", "checkpoint_every_s=null"]), tmp_path / "found")
    assert result.checkpoint.is_relative_to(tmp_path / "found") and verify(result.checkpoint).epoch == 1
    assert trained_once(result.checkpoint, 0.5) == {"once": 870, "lost": 0, "repeated": 0}
    assert result.history[0]["trained_rows"] == 870


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_a_killed_worker_is_replaced(data, uninterrupted, tmp_path):
    killed = []

    def kill_one(line) -> None:
        if line["kind"] == "epoch" and not killed:
            killed.append(worker_pid())
            os.kill(killed[0], signal.SIGKILL)

    resumed = trainer.fit(config(data, refit=False), tmp_path, on_report=kill_one)
    assert killed
    assert_same(uninterrupted.fitted.checkpoint, resumed.checkpoint)


def start_and_kill(cfg: TrainConfig, out: Path, when: str) -> Path:
    """Train in a process of its own, and SIGKILL it when a checkpoint that `when` matches is committed."""
    script = f"""
from recsys_dist.train import trainer
from recsys_dist.train.settings import TrainConfig
trainer.fit(TrainConfig.parse({cfg.model_dump(mode="json")!r}), {str(out)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    run = trainer.run_directory(cfg, Prepared.open(cfg.data), out)
    deadline = time.monotonic() + 240
    while not list(storage.below(cfg.checkpoints, run).glob(f"{when}/manifest.json")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    everything = [process, *psutil.Process(process.pid).children(recursive=True)]
    for each in everything:  # as a machine goes down: the driver, its cluster, its workers
        with contextlib.suppress(psutil.NoSuchProcess):
            each.send_signal(signal.SIGKILL)
    process.wait()
    psutil.wait_procs(everything[1:])
    return run


def worker_pid() -> int:
    """Of one training worker of this test's own cluster: a child of its raylet."""
    [raylet] = ray._private.worker._global_node.all_processes["raylet"]
    found = Path(f"/proc/{raylet.process.pid}/task/{raylet.process.pid}/children").read_text().split()
    titles = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in found}
    return next(pid for pid, title in titles.items() if b"RayTrainWorker" in title)


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_a_nan_ends_the_run_once_and_names_the_row(tmp_path):
    data = prepared.make(tmp_path / "data", bad_row=7)
    with pytest.raises(NonFiniteLossError, match=r"1 of its \d+ rows: shard 1 row 7.*ranking/train/part-"):
        trainer.fit(config(data, max_failures=3), tmp_path / "out")


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_a_worker_that_hangs_is_replaced_after_the_timeout(data, tmp_path):
    """Alone, where no other one waits for it; others would end as their collectives do."""
    model = {"name": "jobs.ledger_model:Model", "shards": prepared.SPLITS["train"], "pause_s": 0.1}
    optimizer, stopped = {"deep": {"lr": 0.5}}, []
    cfg = config(data, model=model, epochs=1, refit=False, optimizer=optimizer, num_workers=1)

    def stop_one(line) -> None:
        if line["kind"] == "curve" and not stopped:
            stopped.append(worker_pid())
            os.kill(stopped[0], signal.SIGSTOP)

    patient = cfg.override(["timeout_s=10", "checkpoint_every_s=0.5", "max_failures=3"])
    result = trainer.fit(patient, tmp_path, on_report=stop_one)
    assert stopped and not psutil.pid_exists(stopped[0])
    assert trained_once(result.checkpoint, 0.5) == {"once": 870, "lost": 0, "repeated": 0}


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_a_shard_that_vanishes_while_it_is_trained_on_is_named(tmp_path):
    data = prepared.make(tmp_path / "data")
    lost = data / "ranking/train/part-00001.parquet"

    def vanish(line) -> None:
        if line["kind"] == "epoch":
            lost.unlink(missing_ok=True)

    cfg = config(data, epochs=500, patience=500, refit=False, max_failures=0)
    with pytest.raises(DataError, match=rf"{lost}' cannot be read: .*prepare again"):
        trainer.fit(cfg, tmp_path / "out", on_report=vanish)


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_a_worker_without_memory_ends_training_once_and_says_so(data, tmp_path):
    model = {"name": "tests.train.hungry:Model", "shards": prepared.SPLITS["train"]}
    cfg = config(data, model=model, max_failures=3)
    with pytest.raises(TrainError, match=r"not enough memory: .*1125899906842624 bytes.*lower batch_rows"):
        trainer.fit(cfg, tmp_path)


@pytest.mark.ray
@pytest.mark.e2e
def test_where_ray_ends_workers_for_a_full_memory_it_says_so(data, tmp_path):
    full = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"}
    environment = {**os.environ, **full}
    environment.pop("RAY_ADDRESS", None)
    command = [sys.executable, "-m", "jobs.train", "wide_deep", f"data={data}", "max_failures=0"]
    ended = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert ended.returncode == 2 and ended.stderr.startswith("error: the memory of a machine was full (")
    assert "lower batch_rows" in ended.stderr and ended.stderr.endswith(
        "the same command goes on from there\n"
    )


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_a_step_with_a_nan_is_left_out_if_one_may_be(tmp_path):
    data = prepared.make(tmp_path / "data", bad_row=7)
    result = trainer.fit(config(data, epochs=1, refit=False, skip_steps=1), tmp_path / "out")
    assert (result.history[0]["trained_rows"], result.history[0]["skipped_rows"]) == (870 - 64, 64)
    assert all(np.isfinite(value).all() for value in weights(result.checkpoint).values())


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_training_that_diverges_goes_back_and_on_with_half_the_rates(data, tmp_path):
    """14 steps an epoch, by 0.045 each: the second one passes 1, and is trained again by half of that."""
    model = {"name": "tests.train.diverging:Model", "shards": prepared.SPLITS["train"]}
    optimizer, lines = {"dense": {"lr": 0.045}}, []
    cfg = config(data, model=model, optimizer=optimizer, refit=False, checkpoint_every_s=None)
    result = trainer.fit(cfg.override(["max_rollbacks=1"]), tmp_path, on_report=lines.append)
    newest = latest_valid(result.run / "choose")
    assert newest.manifest.rollbacks == 1
    assert weights(newest.path)["bias"] == pytest.approx(14 * 0.045 + 14 * 0.045 / 2, rel=1e-4)
    [told] = [line for line in lines if line["kind"] == "notice"]
    assert "rollback 1" in told["what"] and "step 23 is not finite" in told["details"][0]
