import gc
import io
import json
import signal
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.worker_group.poll import WorkerGroupPollStatus, WorkerStatus
from ray.train.v2.api.exceptions import WorkerGroupError
from torchrec.distributed.types import ShardedModule
from tqdm import tqdm

from recsys_dist.config import load_yaml
from recsys_dist.data.collate import collate
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import ConfigError, DataError, NonFiniteLossError, TrainError
from recsys_dist.metrics import RankingState
from recsys_dist.train import phase, trainer, worker
from recsys_dist.train.checkpoint import MANIFEST, load_for_inference
from recsys_dist.train.fence import take_over
from recsys_dist.train.pretrained import RESULT
from recsys_dist.train.sampling import PARTS
from recsys_dist.train.settings import TrainConfig
from recsys_dist.train.sharding import shard
from recsys_dist.train.telemetry import TRACE
from recsys_dist.train.validate import user_keys
from recsys_dist.train.worker import train_worker
from tests.train import prepared
from tests.train.runs import assert_calibrated, assert_same, config, weights


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_a_run_from_shards_to_a_checkpoint(data, uninterrupted):
    result, lines = uninterrupted.fitted, uninterrupted.lines
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
    assert trainer.fit(config(data, refit=False), result.run.parent).checkpoint == result.checkpoint
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
def test_without_workers_it_is_the_run_of_one(data, tmp_path):
    cfg, threads = config(data, epochs=1, refit=False), torch.get_num_threads()
    here, one = (trainer.fit(cfg.override([f"num_workers={n}"]), tmp_path / str(n)) for n in (0, 1))
    assert_same(here.checkpoint, one.checkpoint)
    bits = trainer.fit(cfg.override(["num_workers=0", "autocast=bf16"]), tmp_path / "bits")
    assert bits.history[0]["loss"] == pytest.approx(here.history[0]["loss"], rel=0.01)
    assert bits.history[0]["loss"] != here.history[0]["loss"]
    assert not dist.is_initialized(), "the next one starts as this one did"
    assert torch.get_num_threads() == threads and "_Paced" not in str(ray.data.DataContext.get_current())
    bad = prepared.make(tmp_path / "bad", bad_row=7)
    with pytest.raises(NonFiniteLossError, match=r"1 of its \d+ rows: shard 1 row 7"):
        trainer.fit(config(bad, num_workers=0), tmp_path / "out")


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_a_refit_does_not_hold_the_model_before_it(data, tmp_path, monkeypatch):
    alive = []

    def counted(*given):
        alive.append(sum(issubclass(type(one), ShardedModule) for one in gc.get_objects()))
        return shard(*given)

    gc.collect()
    gc.disable()  # else it may look by chance
    monkeypatch.setattr(phase, "shard", counted)
    try:
        trainer.fit(config(data, num_workers=0, epochs=1), tmp_path)
    finally:
        gc.enable()
    assert alive == [0, 0], "of choose and of refit"


def started(cfg, run) -> dict[str, object]:
    """What a worker is told."""
    digest = Prepared.open(cfg.data).manifest.data_digest
    told = {"config": cfg.model_dump(mode="json"), "run": str(run), "start": take_over(run, None)}
    return {**told, "data_digest": digest}


def test_data_that_were_prepared_anew_meanwhile_are_not_trained_on(data, tmp_path):
    told = {**started(config(data, num_workers=0), tmp_path), "data_digest": "of yesterday"}
    with pytest.raises(DataError, match="was prepared anew meanwhile: start again"):
        train_worker(told)
    assert not dist.is_initialized()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_process_without_a_gpu_does_not_train_on_its_cpu_instead(data, tmp_path):
    cfg = config(data, num_workers=0, use_gpu=True)
    with pytest.raises(ConfigError, match="sees no GPU"):
        train_worker(started(cfg, tmp_path))
    assert not dist.is_initialized()


@pytest.mark.parametrize("error", [MemoryError("of 9 GiB"), RuntimeError("can't allocate memory: 9 GiB")])
def test_memory_that_is_not_there_is_one_line_without_workers_too(data, tmp_path, monkeypatch, error):
    def lacking(_: object) -> None:
        raise error

    monkeypatch.setattr(worker, "all_phases", lacking)
    monkeypatch.setattr(worker, "Common", lambda *_: None)
    cfg = config(data, num_workers=0)
    with pytest.raises(TrainError, match=r"not enough memory: .*9 GiB; lower batch_rows"):
        train_worker(started(cfg, tmp_path))


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
    optimizer = {"dense": {"lr": 0.1}, "deep": {"lr": 0.9}}
    cfg = config(data, epochs=6, patience=5, refit=False, optimizer=optimizer, num_workers=0)
    found = trainer.fit(cfg.override(["optimizer.plateau=1e-9"]), tmp_path)
    aucs = [entry["auc"] for entry in found.history]
    worse = next(n for n in range(1, 6) if aucs[n] <= max(aucs[:n]))
    assert len(set(aucs[: worse + 1])) == worse + 1 and len(aucs) > worse + 1
    np.testing.assert_allclose(aucs[worse + 1 :], aucs[worse], atol=1e-4)


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_a_profiled_run_is_the_same_run_with_a_trace(data, uninterrupted, tmp_path):
    plain, on_ctrl_c = uninterrupted.fitted, signal.getsignal(signal.SIGINT)
    profiled = trainer.fit(config(data, refit=False, profile=True), tmp_path)
    assert signal.getsignal(signal.SIGINT) is on_ctrl_c, "Ray's own handler ends a job without a word"
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


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
def test_more_workers_than_cpus(data, tmp_path):
    with pytest.raises(ConfigError, match=r"need 8 CPUs and the cluster has 2; take fewer workers"):
        trainer.fit(config(data, num_workers=8), tmp_path)


def test_what_workers_raised_is_told_without_tracebacks(data, tmp_path):
    def status(message: str) -> WorkerStatus:
        frames = "  File 'x.py', line 1, in loss\n    return a + b\n           ~~^~~\n" * 2
        trace = f"Traceback (most recent call last):\n{frames}{message}\n"
        return WorkerStatus(running=False, error=UserExceptionWithTraceback(ValueError(), trace))

    of_cuda = "RuntimeError: CUDA error: device-side assert triggered\nCompile with TORCH_USE_CUDA_DSA\n"
    messages = ["ValueError: shapes", "ValueError: shapes", of_cuda]
    failed = WorkerGroupPollStatus(dict(enumerate(map(status, messages))))
    error = WorkerGroupError(failed.get_error_string(), failed.errors)
    said = str(trainer._explained(error, tmp_path, config(data)))
    assert said.endswith("The last failure: ValueError: shapes; " + of_cuda.splitlines()[0])
    assert str(trainer._explained(RayError("a node died"), tmp_path, config(data))).endswith(": a node died")


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
    assert "'metric'" in message(metric="recall@0") and "'metric'" in message(metric="recall@10000")
    assert "set patience=2 or more" in message(patience=1, optimizer={"plateau": 0.1})
    assert "did you mean 'click'" in message(label="clik")
    assert "did you mean 'wide_deep'" in message(model={"name": "wide_dep"})
    assert "did you mean 'hidden'" in message(model={"name": "wide_deep", "hiden": [1]})
    assert "scales item_vectors, and there are none" in message(item_vectors_std=0.1)
    assert "label is for ranking models" in message(model={"name": "youtubednn"}, label="click")


def test_data_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="holds no prepared data"):
        trainer.fit(config(tmp_path), tmp_path)


def test_a_run_is_known_by_what_it_learns_not_by_where(data):
    digest = config(data).run_digest("d")
    assert config(data, num_workers=1, threads_per_worker=2, max_failures=0).run_digest("d") == digest
    assert config(data, profile=True).run_digest("d") == digest
    assert config(data, sharding={"kind": "row_wise"}).run_digest("d") == digest
    assert config(data, sharding={"exchange": "fp16"}).run_digest("d") != digest
    assert config(data, seed=1).run_digest("d") != digest
    assert config(data).run_digest("other data") != digest


def test_a_runs_config_holds_wherever_it_is_read(data, tmp_path, monkeypatch):
    """A run that starts from it elsewhere finds its data by it."""

    def trained(_: TrainConfig, run: Path, __: str) -> None:
        result = {"checkpoint": "c", "chosen_epoch": 1, "history": [], "seconds": 1.0, "rows_per_s": 1.0}
        (run / RESULT).write_text(json.dumps(result))

    monkeypatch.setattr(trainer, "_train", trained)
    monkeypatch.setattr(trainer.session, "connect", lambda: None)
    monkeypatch.setattr(trainer, "check_cluster", lambda _: None)
    monkeypatch.chdir(data.parent)
    cfg = config(Path(data.name))
    found = TrainConfig.parse(load_yaml(trainer.fit(cfg, tmp_path).run / "config.yaml"))
    assert found.data == str(data)
    assert found.run_digest("d") == cfg.run_digest("d"), "the same run, to be continued"


def test_the_logged_config_is_the_config(data):
    cfg = config(data)
    assert TrainConfig.parse(json.loads(cfg.model_dump_json())) == cfg


def test_checkpoints_of_another_directory_are_brought_to_the_run(data, tmp_path):
    """Beside them lies who holds the run, see `train.fence`."""
    cfg = config(data).override([f"checkpoints={tmp_path / 'store'}"])
    run = tmp_path / "out/ranking-x"
    there = tmp_path / "store/ranking-x"
    (there / "choose/epoch-0001-a").mkdir(parents=True)
    (there / "choose/epoch-0001-a" / MANIFEST).write_text("{}")
    run.mkdir(parents=True)
    take_over(run, cfg.checkpoints)
    (run / RESULT).write_text('{"checkpoint": "choose/epoch-0001-a"}')
    trainer._bring_here(cfg, run)
    assert (run / "choose/epoch-0001-a" / MANIFEST).read_text() == "{}"
