"""Three days, each run going on from the day before's: vocabularies that grow and shrink, and one history."""

import datetime as dt
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from mlflow.tracking import MlflowClient

from jobs import tracked
from recsys_dist.data.prepared import Prepared
from recsys_dist.data.split import Split
from recsys_dist.models.wide_deep import Model
from recsys_dist.tracking import TrackingConfig
from recsys_dist.train.catalogue import catalogue_of
from recsys_dist.train.checkpoint import read, read_manifest
from recsys_dist.train.loop import Loss
from recsys_dist.train.settings import TrainConfig
from recsys_dist.train.sharding import materialise
from tests import bundles
from tests.data import small_log
from tests.train.runs import config

LIMITS = {"item": {"max_age_days": 2}}
STILL = {"lr": 1e-30}  # moves no weight, so that a vector tells of the day when its value came
TABLE = "model.fields.tables.embedding_bags.item.weight"


def prepared_days(root: Path) -> list[Prepared]:
    """What each of three mornings knows: the log up to that day, which is the test day."""
    log, days = small_log.events(), []
    for number in range(3):
        valid, test = (small_log.FIRST_DAY + dt.timedelta(days=4 + number + later) for later in (0, 1))
        known = log.filter(pc.less_equal(log["date"], pa.scalar(test)))
        split = Split(valid_from=valid, test_from=test)
        days.append(bundles.prepare(root / f"day-{number}", known, split, LIMITS, days[-1] if days else None))
    return days


def items(prepared: Prepared) -> list[str]:
    return prepared.encoders.vocabularies["item"].values.to_pylist()


def fresh(cfg: TrainConfig, prepared: Prepared) -> np.ndarray:
    """What the rows of the item table start with."""
    schema = cfg.inputs(prepared)
    loss = Loss(Model(cfg.model, schema, catalogue_of(prepared, schema, ("train",))))
    return materialise(loss, cfg.seed).state_dict()[TABLE].numpy()


def saved(checkpoint: Path, name: str, like: np.ndarray) -> np.ndarray:
    tensor = torch.from_numpy(np.empty_like(like))
    read(checkpoint, {name: tensor})
    return tensor.numpy()


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.e2e
def test_values_come_stay_and_go_and_the_history_is_one(tmp_path: Path) -> None:
    days = prepared_days(tmp_path)
    for before, now in itertools.pairwise(days):
        assert set(items(now)) - set(items(before)), "an item is new"
        assert set(items(before)) - set(items(now)), "an item is evicted"
    vectors: dict[str, np.ndarray] = {}
    sums: dict[str, float] = {}
    runs: list[Path] = []
    for number, day in enumerate(days):
        warm = {"warm_start": str(runs[-1])} if runs else {}
        cfg = config(
            day.path, seed=number, num_workers=0, epochs=1, refit=False, calibration="none", **warm
        ).override([f"optimizer.{of}.lr={STILL['lr']}" for of in ("dense", "deep", "wide")])
        fitted = tracked.run(cfg, tmp_path / "out", TrackingConfig(), evaluate=None).fitted
        start = fresh(cfg, day)
        expected = {item: vectors.get(item, start[row]) for row, item in enumerate(items(day), 1)}
        found = saved(fitted.checkpoint, f"weights.{TABLE}", start)
        np.testing.assert_array_equal(found[1:], np.stack(list(expected.values())))
        total = dict(zip(items(day), saved(fitted.checkpoint, f"sums.{TABLE}", start[:, 0])[1:], strict=True))
        kept = [item for item in total if item in sums]
        assert all(total[item] >= sums[item] for item in kept)
        assert not kept or np.mean([total[item] > sums[item] for item in kept]) > 0.5
        vectors, sums = expected, total
        runs.append(fitted.run)
        chain = read_manifest(fitted.checkpoint).chain
        assert (chain.first, chain.epochs) == (runs[0].name, number) if number else chain is None
    assert_one_history(tmp_path / "out", [run.name for run in runs])


def assert_one_history(out: Path, names: list[str]) -> None:
    """In MLflow: runs that one tag finds, whose steps and epochs go on where the day before's ended."""
    client = MlflowClient(tracking_uri=f"sqlite:///{out.resolve()}/mlflow.db")
    [experiment] = (e for e in client.search_experiments() if e.name == TrackingConfig().experiment)
    found = client.search_runs([experiment.experiment_id], f"tags.chain = '{names[0]}'")
    by_name = {run.info.run_name: run for run in found}
    assert by_name.keys() == set(names)
    assert [by_name[name].data.tags.get("warm_start") for name in names] == [None, *names[:-1]]
    histories = {
        metric: [
            [m.step for m in client.get_metric_history(by_name[name].info.run_id, metric)] for name in names
        ]
        for metric in ("choose/loss", "choose/epoch/auc")
    }
    assert histories["choose/epoch/auc"] == [[1], [2], [3]]
    steps = [sorted(of_day) for of_day in histories["choose/loss"]]
    assert all(before[-1] + 1 == now[0] for before, now in itertools.pairwise(steps)), steps
