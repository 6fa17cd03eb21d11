import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import ray
from tqdm import tqdm

from jobs.ledger_model import trained_once
from recsys_dist.data.collate import collate
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import ConfigError, DataError, NonFiniteLossError, TrainError
from recsys_dist.metrics import RankingState
from recsys_dist.train import trainer
from recsys_dist.train.checkpoint import latest_valid, load_for_inference
from recsys_dist.train.progress import PROGRESS, read
from recsys_dist.train.sampling import PARTS
from recsys_dist.train.settings import TrainConfig
from recsys_dist.train.telemetry import TRACE
from recsys_dist.train.validate import user_keys
from tests.train import prepared

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepared.make(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()


def config(data: Path, **settings) -> TrainConfig:
    base = {
        "data": str(data),
        "model": {"name": "wide_deep", "embedding_dim": 8, "hidden": [16]},
        "batch_rows": 64,
        "num_workers": 2,
        "epochs": 2,
        "patience": 2,
        "max_failures": 1,
        "optimizer": {"deep": {"lr": 0.3}, "wide": {"lr": 0.3}, "dense": {"lr": 0.01}},
    }
    return TrainConfig.parse({**base, **settings})


def weights(checkpoint: Path) -> dict[str, np.ndarray]:
    model, _ = load_for_inference(checkpoint)
    return {name: value.numpy() for name, value in model.state_dict().items()}


def assert_same(one: Path, other: Path) -> None:
    expected = weights(one)
    for name, value in weights(other).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def assert_calibrated(checkpoint: Path, entry: dict) -> None:
    """By the map that was fitted on the validation rows of the chosen epoch."""
    found = weights(checkpoint)
    points = np.array(entry["calibration"])
    assert points.shape == (2, 2)
    np.testing.assert_array_equal(
        points, np.stack([found["calibration.x_K"], found["calibration.y_K"]], 1)[:2]
    )


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_a_run_from_shards_to_a_checkpoint(data, tmp_path):
    lines = []
    on_ctrl_c = signal.getsignal(signal.SIGINT)
    result = trainer.fit(config(data, refit=False), tmp_path, on_report=lines.append)
    assert signal.getsignal(signal.SIGINT) is on_ctrl_c, "Ray's own handler ends a job without a word"
    assert [entry["trained_rows"] for entry in result.history] == [sum(prepared.SPLITS["train"])] * 2
    assert result.history[-1]["auc"] > 0.6
    assert [line["epoch"] for line in lines if line["kind"] == "epoch"] == [1, 2]
    points = [line for line in lines if line["kind"] == "curve"]
    assert len(points) > 10
    for point in points:
        assert point["gradients"].keys() == {"tower.layers.0", "tower.layers.2"}
        assert min(point["gradients"].values()) > 0
        assert point["rows_per_s"] > 0 and point["loader_s"] > 0
        assert tuple(point["step_ms"]) == PARTS
        assert min(point["step_ms"][part] for part in ("exchange", "lookup", "dense", "optimizer")) > 0
        assert point["tables"].keys() == {"user", "item"}
        for shares in point["tables"].values():  # the rows of the made-up data are all known, and often used
            assert shares["unknown"] == 0 and 0.1 < shares["distinct"] < 1
    best = result.history[result.chosen_epoch - 1]
    assert best["auc"] == max(entry["auc"] for entry in result.history)

    model, manifest = load_for_inference(result.checkpoint)  # the same metric, recomputed in one process
    assert manifest.epoch == result.chosen_epoch
    assert_calibrated(result.checkpoint, best)
    model.calibration.set([])  # the metrics are of the model's own scores
    tables = [pq.read_table(file) for file in Prepared.open(data).files("ranking/valid")]
    states = [
        RankingState(
            model(collate(table, manifest.data_schema)).detach().numpy(),
            table["click"].to_numpy(),
            user_keys(table["user_id"]),
        )
        for table in tables
    ]
    found = states[0].merge(*states[1:]).compute()
    for name in ("auc", "gauc", "logloss", "rows", "users"):
        assert best[name] == pytest.approx(found[name], rel=1e-5), name

    began = time.perf_counter()
    assert trainer.fit(config(data, refit=False), tmp_path).checkpoint == result.checkpoint
    assert time.perf_counter() - began < 2, "a finished run returns at once"


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_a_recall_model_is_validated_over_the_whole_catalogue_and_refitted(data, tmp_path):
    model = {"name": "youtubednn", "embedding_dim": 8, "output_dim": 8, "negatives": 16}
    cfg = config(data, model=model, epochs=1, metric="ndcg@20")
    result = trainer.fit(cfg, tmp_path)
    assert 0 < result.history[0]["recall@20"] <= 1 and 0 < result.history[0]["ndcg@20"] <= 1
    assert (result.history[0]["users"], result.history[0]["pairs"]) == (30, 60)
    _, manifest = load_for_inference(result.checkpoint)
    assert manifest.phase == "refit"
    assert manifest.history[0]["trained_rows"] == sum(map(sum, prepared.SPLITS.values()))


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_occurrences_are_counted_for_training_alone(data, tmp_path):
    """An id is pulled by λ / n in each of the 14 steps that have it: to nothing; by less without counts."""
    model = {"name": "din", "embedding_dim": 8, "hidden": [16], "regularisation": 40.0, "embedding_std": 1.0}
    cfg = config(data, model=model, optimizer={"deep": {"rule": "sgd", "lr": 0.5}}, epochs=1, refit=False)
    table = weights(trainer.fit(cfg, tmp_path).checkpoint)["behaviours.tables.embedding_bags.item.weight"]
    assert 0 < np.abs(table[1:]).max() < 0.1


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_rates_fall_after_an_epoch_that_was_no_better_and_when_it_is_repeated(data, tmp_path):
    """At nearly nothing the weights stand still: the epochs after the first worse one change little."""
    cfg = config(data, epochs=6, patience=5, optimizer={"dense": {"lr": 0.1}, "deep": {"lr": 0.9}})
    found = trainer.fit(cfg.override(["optimizer.plateau=1e-9"]), tmp_path)
    aucs = [entry["auc"] for entry in found.history]
    worse = next(n for n in range(1, 6) if aucs[n] <= max(aucs[:n]))
    assert len(set(aucs[: worse + 1])) == worse + 1 and len(aucs) > worse + 1
    np.testing.assert_allclose(aucs[worse + 1 :], aucs[worse], atol=1e-4)


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_killed_and_started_again_is_the_uninterrupted_run(data, tmp_path):
    cfg = config(data, epochs=3, patience=3)
    uninterrupted = trainer.fit(cfg, tmp_path / "a")
    run = start_and_kill(cfg, tmp_path / "b", "choose/epoch-0001-*")
    assert not (run / "result.json").exists()
    resumed = trainer.fit(cfg, tmp_path / "b")
    assert_same(uninterrupted.checkpoint, resumed.checkpoint)
    assert resumed.checkpoint.parent.name == "refit"
    assert_calibrated(resumed.checkpoint, resumed.history[resumed.chosen_epoch - 1])
    assert [e["auc"] for e in resumed.history] == [e["auc"] for e in uninterrupted.history]


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_killed_within_an_epoch_it_goes_on_there_and_is_the_uninterrupted_run(data, tmp_path):
    """Dropout too draws in each step what it would have drawn."""
    cfg = config(data, refit=False, model={"name": "mlp", "embedding_dim": 8, "hidden": [16], "dropout": 0.3})
    uninterrupted = trainer.fit(cfg, tmp_path / "a")
    often = cfg.override(["checkpoint_every_s=0"])
    run = start_and_kill(often, tmp_path / "b", "choose/step-00000000[4-9]-*")
    before = latest_valid(run / "choose").manifest
    assert before.epoch == 0 and 4 <= before.step < 14 and before.position.totals.rows == 64 * before.step
    resumed = trainer.fit(cfg, tmp_path / "b")
    assert_same(uninterrupted.checkpoint, resumed.checkpoint)
    for name in ("auc", "loss", "trained_rows"):
        found = [entry[name] for entry in resumed.history]
        assert found == [entry[name] for entry in uninterrupted.history], name
    told = [line for line, _ in read(run / PROGRESS) if line["kind"] == "curve"]
    assert [line["step"] for line in told] == list(range(1, 29)), "the curve goes on, and tells nothing twice"
    assert not list(run.glob("choose/step-*")), "an epoch's end replaces what was saved within it"


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_rows_are_trained_once_when_fewer_workers_go_on_within_an_epoch(data, tmp_path):
    model = {"name": "jobs.ledger_model:Model", "shards": prepared.SPLITS["train"]}
    optimizer = {"deep": {"lr": 0.5}}
    cfg = config(data, model=model, epochs=1, refit=False, optimizer=optimizer, checkpoint_every_s=0)
    run = start_and_kill(cfg, tmp_path, "choose/step-00000000[3-9]-*")
    before = latest_valid(run / "choose").manifest
    assert before.workers == 2
    result = trainer.fit(cfg.override(["num_workers=1", "checkpoint_every_s=null"]), tmp_path)
    assert trained_once(result.checkpoint, 0.5) == {"once": 870, "lost": 0, "repeated": 0}
    assert result.history[0]["trained_rows"] == 870


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_a_killed_worker_is_replaced(data, tmp_path):
    cfg = config(data, refit=False)
    uninterrupted = trainer.fit(cfg, tmp_path / "a")
    killed = []

    def kill_one(line) -> None:
        if line["kind"] == "epoch" and not killed:
            killed.append(worker_pid())
            os.kill(killed[0], signal.SIGKILL)

    resumed = trainer.fit(cfg, tmp_path / "b", on_report=kill_one)
    assert killed
    assert_same(uninterrupted.checkpoint, resumed.checkpoint)


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_a_profiled_run_is_the_same_run_with_a_trace(data, tmp_path):
    cfg = config(data, epochs=1, refit=False)
    plain = trainer.fit(cfg, tmp_path / "a")
    profiled = trainer.fit(cfg.override(["profile=true"]), tmp_path / "b")
    assert profiled.run.name == plain.run.name
    assert_same(plain.checkpoint, profiled.checkpoint)
    assert not (plain.run / TRACE).exists()
    events = json.loads((profiled.run / TRACE).read_text())["traceEvents"]
    steps = [event for event in events if event["name"].startswith("Optimizer.step#Adam")]
    assert len(steps) == 6, "of the 5th to the 10th step"
    names = {event["name"] for event in events}
    assert {"aten::addmm", "gloo:all_reduce"} < names


def test_the_bar_tells_the_rate_of_training_also_after_a_resume():
    """Half of the rows were trained before the restart, and Ray took its time to start: neither counts."""
    said = io.StringIO()
    point = {"phase": "choose", "epoch": 2, "epochs": 3, "loss": 0.5, "of_rows": 10_000}
    with tqdm(bar_format=trainer.BAR, unit_scale=True, file=said, mininterval=0, ncols=100) as bar:
        bar.start_t -= 60
        trainer.show({**point, "rows": 5_000, "rows_per_s": 100.0}, bar)
        assert "50%" in said.getvalue() and "100 rows/s, 00:50 left, loss 0.5000" in said.getvalue()
        trainer.show({**point, "rows": 6_000, "rows_per_s": 200.0}, bar)
        assert "60%" in said.getvalue() and "200 rows/s, 00:20 left" in said.getvalue()
        trainer.show({**point, "rows": 4_000, "rows_per_s": 100.0}, bar)  # a worker was lost
        assert bar.n == 4_000


def start_and_kill(cfg: TrainConfig, out: Path, when: str) -> Path:
    """Train in a process of its own, and SIGKILL it when a checkpoint that `when` matches is committed."""
    script = f"""
from recsys_dist.train import trainer
from recsys_dist.train.settings import TrainConfig
trainer.fit(TrainConfig.parse({cfg.model_dump(mode="json")!r}), {str(out)!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    run = trainer.run_directory(cfg, Prepared.open(cfg.data), out)
    deadline = time.monotonic() + 120
    while not list(run.glob(f"{when}/manifest.json")):
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
@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_hangs_is_replaced_after_the_timeout(data, tmp_path, workers):
    """Alone too, where no other one waits for it."""
    model = {"name": "jobs.ledger_model:Model", "shards": prepared.SPLITS["train"], "pause_s": 0.1}
    optimizer, stopped = {"deep": {"lr": 0.5}}, []
    cfg = config(data, model=model, epochs=1, refit=False, optimizer=optimizer, num_workers=workers)

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

    cfg = config(data, epochs=500, patience=500, refit=False)
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


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
def test_more_workers_than_cpus(data, tmp_path):
    with pytest.raises(ConfigError, match=r"need 64 CPUs and the cluster has 2; take fewer workers"):
        trainer.fit(config(data, num_workers=64), tmp_path)


def test_settings_that_do_not_go_together_are_refused_before_anything_starts(data, tmp_path):
    def message(**settings) -> str:
        with pytest.raises(ConfigError) as error:
            trainer.fit(config(data, **settings), tmp_path)
        return str(error.value)

    assert "batch_rows=64 are fewer than the workers (num_workers=(1, 65))" in message(num_workers=[1, 65])
    assert "the fewest come first" in message(num_workers=[3, 2])
    assert "'recall@100' is not one of a ranking model; take auc or" in message(metric="recall@100")
    assert "'auc' is not one of a recall model; take recall@100 or" in message(
        model={"name": "youtubednn"}, metric="auc"
    )
    assert "'metric'" in message(metric="recall@0")
    assert "set patience=2 or more" in message(patience=1, optimizer={"plateau": 0.1})
    assert "did you mean 'click'" in message(label="clik")
    assert "did you mean 'wide_deep'" in message(model={"name": "wide_dep"})
    assert "did you mean 'hidden'" in message(model={"name": "wide_deep", "hiden": [1]})
    assert "label is for ranking models" in message(model={"name": "youtubednn"}, label="click")


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="holds no prepared data"):
        trainer.fit(config(tmp_path), tmp_path)


def test_a_run_is_known_by_what_it_learns_not_by_where(data):
    digest = config(data).run_digest("d")
    assert config(data, num_workers=1, threads_per_worker=2, max_failures=0).run_digest("d") == digest
    assert config(data, profile=True).run_digest("d") == digest
    assert config(data, seed=1).run_digest("d") != digest
    assert config(data).run_digest("other data") != digest


def test_the_logged_config_is_the_config(data):
    cfg = config(data)
    assert TrainConfig.parse(json.loads(cfg.model_dump_json())) == cfg
