"""The speed benchmark of all models: its rows, that both sides compute alike, what its figures come to."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from jobs import bench_models as job
from jobs import bench_train
from jobs.bench_sides import ours, plain, rows
from recsys_dist.errors import ConfigError
from recsys_dist.models.protocol import model_module
from recsys_dist.train.sharding import materialise

ROWS = rows.made_up(64)


def test_histories_are_as_long_as_the_module_says() -> None:
    many = rows.made_up(4000)
    assert many["length"].mean() == pytest.approx(20, abs=0.5) and 40 < many["length"].max() <= 50
    assert (many["ids"] >= 1).all() and (many["ids"].max(0) < list(rows.TABLES.values())).all()
    real = np.arange(rows.LONGEST) < many["length"][:, None]
    for name in ("history_item", "negative_category", "session"):
        assert ((many[name] > 0) == real).all()


@pytest.mark.parametrize(("gpus", "workers"), [(0, None), (1, [1]), (2, [1]), (3, [1, 2])])
def test_workers_that_each_have_a_gpu_are_as_many_as_there_is_room_for(
    gpus: int, workers: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The groups of one and of two live at once."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if workers is None:
        with pytest.raises(ConfigError, match="--gpu: PyTorch sees no GPU"):
            bench_train.worlds(True)
    else:
        assert bench_train.worlds(True) == workers
    assert bench_train.worlds(False) == [1, 2]
    with pytest.raises(ConfigError, match="--gpu: models, overhead and memory are measured on CPUs alone"):
        bench_train.parse(["--gpu", "--memory"])


def test_both_sides_read_the_same_rows() -> None:
    (batch,) = ours._batches(ours.table(ROWS), ours.SCHEMA, 64)
    history = batch.sparse["history_item"]
    assert history.lengths().tolist() == ROWS["length"].tolist()
    padded = plain.Inputs.of(ROWS)
    assert torch.equal(history.values(), padded.history[0][padded.real].int())
    assert torch.equal(batch.sparse["hour"].values(), padded.ids[:, list(rows.TABLES).index("hour")].int())
    assert torch.equal(batch.dense, padded.dense)


@pytest.mark.parametrize("name", ["lr", "mlp", "dcn"])
def test_the_plain_version_has_as_many_weights(name: str) -> None:
    module = model_module(name)
    cfg = module.Config()
    model = materialise(module.Model(cfg, module.Model.inputs(ours.SCHEMA, cfg)), seed=0)
    wide = 4 if name == "lr" else 1  # a linear weight of ours is four columns
    mine = {n: w.numel() for n, w in model.named_parameters()}
    theirs = sum(weight.numel() for weight in plain._MAKE[name]().parameters())
    assert sum(n // wide if "embedding" in name else n for name, n in mine.items()) == theirs


def test_a_side_trains_as_it_is_told(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", **ROWS)  # type: ignore[arg-type]
    with job.side("plain", sys.executable, tmp_path / "rows.npz", 32, 1) as side:
        rates = job.measured([side], ["lr", "sasrec"], repeats=2)  # there is no plain SASRec
        assert list(rates) == [("lr", "plain", "matched")]
        assert len(rates["lr", "plain", "matched"]) == 2 and min(rates["lr", "plain", "matched"]) > 0
        with pytest.raises(RuntimeError, match=r"plain failed[\s\S]*KeyError"):
            side.ask("run", "no", "such")


def test_ratios_are_medians_of_repeats() -> None:
    rates = {
        ("mlp", "ours", "step"): [300.0, 200.0, 400.0],
        ("mlp", "ours", "fed"): [100.0, 100.0, 100.0],
        ("mlp", "plain", "matched"): [300.0, 100.0, 100.0],
        ("mlp", "deepctr", "shipped"): [50.0, 25.0, 10.0],
        ("mlp", "deepctr", "matched"): [300.0, 100.0, 200.0],
        ("din", "ours", "step"): [100.0, 100.0, 100.0],
        ("din", "ours", "fed"): [90.0, 90.0, 90.0],
    }
    found = job.figures(rates)
    ratios = {(each["side"], each["setting"]): each["ratio"] for each in found["ours_over"]}
    assert ratios == {("plain", "matched"): 2, ("deepctr", "shipped"): 4, ("deepctr", "matched"): 2}
    assert found["step_times"] == [{"model": "din", "of": "mlp", "ratio": 3.0, "at_most": 2.0}]
    told = {"batch_rows": 4096, "threads": 2, "date": "2026-11-22", "hardware": {}}
    slower = {**rates, ("mlp", "deepctr", "shipped"): [50.0, 50.0, 50.0]}
    text = job.table({**told, **job.figures(slower)})
    assert "50 (2.00*)" in text and "200 (2.00)" in text and "a step of din takes 3.00 of mlp's" in text


def test_models_are_named_and_measured_beside_each_other() -> None:
    assert list(job.groups(["lr", "mlp", "fm", "din"])) == [["lr"], ["fm"], ["mlp", "din"]]
    with pytest.raises(ConfigError, match="'deepfn' is not measured; did you mean 'deepfm'"):
        job.chosen("mlp,deepfn")
    args: argparse.Namespace = bench_train.parse(["--models", "all"])
    assert set(job.chosen(args.models)) == set(ours.MODELS) and args.steps == 8
    assert bench_train.parse([]).steps == 40
