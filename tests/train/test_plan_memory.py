"""What a plan says that workers will hold, beside what they held."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recsys_dist.data.prepared import Prepared
from recsys_dist.models.protocol import model_module
from recsys_dist.train import trainer
from recsys_dist.train.loop import Loss
from recsys_dist.train.plan import describe
from recsys_dist.train.rehearsal import rehearse
from tests.train import prepared, tiny
from tests.train.runs import config

USERS = 1_500_000
RUNS: Mapping[str, dict[str, Any]] = {
    "whole tables": {
        "model": {"name": "wide_deep", "embedding_dim": 32, "hidden": [16]},
        "num_workers": 1,
    },
    "cut by rows, with wide layers": {
        "model": {"name": "din", "embedding_dim": 32, "hidden": [512, 256]},
        "num_workers": 2,
        "sharding": {"kind": "row_wise"},
    },
}


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"train": [8192, 8192], "valid": [150, 51]}
    path = tmp_path_factory.mktemp("prepared")
    return prepared.make(path, sizes_of=sizes, table_rows={**tiny.ROWS, "user": USERS})


@pytest.mark.usefixtures("cluster")
@pytest.mark.ray
@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_workers_hold_what_was_planned(large: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    saved = {"epochs": 1, "refit": False, "checkpoint_every_s": 0}  # after each step, so from a copy
    cfg = config(large, batch_rows=8192, **saved, **settings)
    [plan] = trainer.planned(cfg, Prepared.open(large))
    expected = np.sum(list(plan.holds.values()), axis=0)
    ours = expected - plan.holds["process"]
    assert ours.min() > 200 << 20, "or the process alone decides"
    result = trainer.fit(cfg, tmp_path)
    np.testing.assert_allclose(result.peak_bytes, expected, rtol=0.15)
    assert "measured" in describe(plan, result.peak_bytes) and "measured" not in describe(plan)
    assert trainer.finished(cfg, Prepared.open(large), tmp_path) == result


def test_a_rehearsal_counts_what_is_asked_and_what_is_live() -> None:
    """A linear layer of [4 · 8 + 2, 16], ReLU, a layer of [16, 1], by hand."""
    batch, rows = tiny.batch_of(100, "rehearsal"), 100
    history = int(batch.sparse["history"].lengths().sum())
    found = rehearse(Loss(tiny.Model(tiny.Config(), tiny.schema())), batch, workers=2)
    assert found.ids == {"user": rows, "item": rows + history, "wide_item": rows, "step": history}
    assert found.vectors == {"user": rows, "item": 2 * rows, "wide_item": rows, "step": history}
    answers = rows * (3 * 8 + 4) + history * 8
    kept = rows * (4 * 8 + 2 + 16)  # what both layers read
    assert 4 * (answers + kept) < found.live_bytes < 3 * 4 * (answers + kept)


def test_what_is_live_follows_the_rows() -> None:
    """Of a tower of 64, 32 on 3 fields of 8 and 2 floats."""
    module = model_module("dlrm")
    cfg = module.Config(embedding_dim=8, hidden=(64, 32))

    def live(rows: int) -> int:
        loss = Loss(module.Model(cfg, tiny.schema(), None))
        return rehearse(loss, tiny.batch_of(rows, "rows"), workers=1).live_bytes

    assert live(2000) == pytest.approx(2 * live(1000), rel=0.02)
