"""What a plan says, beside bytes counted by hand and beside what `shard` then does."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs import train as job
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import ConfigError
from recsys_dist.models.protocol import model_module
from recsys_dist.train import trainer
from recsys_dist.train.catalogue import catalogue_of
from recsys_dist.train.loop import Loss
from recsys_dist.train.pieces import pieces
from recsys_dist.train.plan import balanced, describe, plan
from recsys_dist.train.settings import TrainConfig
from recsys_dist.train.sharding import shard
from tests.train import prepared, tiny
from tests.train.ranks import run_ranks


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared.make(tmp_path_factory.mktemp("prepared"))


def config(data: Path, **settings: object) -> TrainConfig:
    model = {"name": "wide_deep", "embedding_dim": 8, "hidden": [16]}
    return TrainConfig.parse({"data": str(data), "model": model, "batch_rows": 64, **settings})


def test_bytes_counted_by_hand(data: Path) -> None:
    """Two workers; the wide tables (one weight each, kept as 4 equal columns) by FTRL, which is not fused."""
    optimizer = {"wide": {"rule": "ftrl"}}
    kinds = {"item": "row_wise", "user": "data_parallel"}
    cfg = config(data, num_workers=2, optimizer=optimizer, sharding={"tables": kinds})
    found = plan(cfg, Prepared.open(data), 2)
    tables = {table.name: table for table in found.tables}
    users, items = tiny.ROWS["user"], tiny.ROWS["item"]
    assert {name: (t.rows, t.dim) for name, t in tables.items()}["item"] == (items, 8)
    assert sorted(tables["item"].pieces) == [(0, items // 2, 8), (1, items // 2, 8)]
    assert sorted(tables["user"].pieces) == [(0, users, 8), (1, users, 8)]
    model = model_module("wide_deep").Model(cfg.model, cfg.inputs(Prepared.open(data)), None)
    dense = sum(w.numel() for name, w in model.named_parameters() if "embedding" not in name)
    wide = [t for t in found.tables if t.rule.rule == "ftrl"]
    weights = 2 * dense + 2 * users * 8 + items * 8 + sum(t.rows * 4 for t in wide)
    states = 2 * 2 * dense + 2 * users + items + sum(t.rows * 2 for t in wide)
    # no kernel steps these: one gradient is kept, and the newest comes beside it
    kept = 2 * dense + 2 * (2 * users * 8 + sum(t.rows * 4 for t in wide))
    assert {share: int(found.holds[share].sum()) for share in ("weights", "optimizer", "gradients")} == {
        "weights": 4 * weights,
        "optimizer": 4 * states,
        "gradients": 4 * kept,
    }
    ids = np.diff(
        pq.read_table(Prepared.open(data).files("ranking/train")[0])["history"].combine_chunks().offsets
    )[:32]  # a worker's part of a batch
    asked, vectors = 64 * (1 + ids.mean()) * 4, 64 * 2 * 8 * 4  # the item and the history, a vector each
    assert found.exchanged["item"] == int((asked + 2 * 2 * vectors) / 2)
    assert found.exchanged["user"] == 2 * users * 8 * 4
    assert found.exchanged["dense"] == 2 * dense * 4


def test_half_precision_halves_vectors_and_gradients_alone(data: Path) -> None:
    whole, half = (
        plan(config(data, num_workers=2, sharding=sharding), Prepared.open(data), 2)
        for sharding in ({}, {"exchange": "fp16"})
    )
    vectors = 2 * 64 * 8 * 4 // 2  # of the user table, there and back; half of them stay where they are
    assert whole.exchanged["user"] - half.exchanged["user"] == vectors // 2
    assert whole.exchanged["dense"] == half.exchanged["dense"]
    assert describe(whole).endswith("dense; vectors and their gradients as fp32")
    assert describe(half).endswith("dense; vectors and their gradients as fp16")


def test_one_worker_sends_nothing(data: Path) -> None:
    assert set(plan(config(data), Prepared.open(data), 1).exchanged.values()) == {0}


def test_what_no_machine_holds_is_refused_with_a_way_out(data: Path) -> None:
    found = plan(config(data), Prepared.open(data), 1)
    held = int(sum(values.sum() for values in found.holds.values()))
    found.refuse_beyond(held)
    with pytest.raises(ConfigError, match=r"most of it process, .* take fewer workers, or train"):
        found.refuse_beyond(held - 1)
    large = dataclasses.replace(found, holds={**found.holds, "weights": np.array([held])})
    with pytest.raises(ConfigError, match=r"largest table '(item|user)' has \d+ rows of 8: prepare with"):
        large.refuse_beyond(held)


def test_a_plan_that_does_not_fit_is_shown_and_then_refused(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer.psutil, "virtual_memory", lambda: SimpleNamespace(total=1000))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(ConfigError, match="training would hold"):
        job.main(["wide_deep", f"data={data}", "num_workers=[1,2]", "--plan"])
    said = capsys.readouterr().out
    assert said.count("sent between workers in a step: 0 B") == 1, "by one worker, and by two"
    assert said.count("sent between workers in a step") == 2


def placed(rank: int, path: str, settings: dict) -> dict[str, list[tuple[int, int, int]]]:
    cfg, data = config(Path(path), **settings), Prepared.open(path)
    catalogue = catalogue_of(data, cfg.inputs(data), ["train"])
    sharding = balanced(cfg, data, catalogue, workers=2)
    torch.manual_seed(0)
    model = model_module(cfg.model.name).Model(cfg.model, cfg.inputs(data), catalogue)
    sharded = shard(Loss(model), model.table_groups(), cfg.optimizer, sharding, 0)
    weights = sharded.weights()
    return {
        table.name: [(rank, *size) for _, _, size in pieces(weights[name], table)]
        for name, table in sharded.tables.items()
    }


@pytest.mark.ranks
@pytest.mark.parametrize(
    "settings",
    [{}, {"sharding": {"kind": "row_wise"}}, {"model": {"name": "din", "embedding_dim": 8}}],
    ids=["auto", "row_wise", "din"],
)
def test_training_places_what_was_planned(data: Path, settings: dict) -> None:
    found = plan(config(data, **settings), Prepared.open(data), 3)
    by_rank = run_ranks(3, placed, str(data), settings)
    for table in found.tables:
        there = [piece for rank in by_rank for piece in rank[table.name] if piece[1]]
        assert sorted(there) == sorted(piece for piece in table.pieces if piece[1]), table.name


def test_the_plan_is_shown_and_nothing_trained(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job.main(["wide_deep", f"data={data}", "num_workers=2", "--plan", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    cfg = job.recipes.parse(["wide_deep", f"data={data}"]).cfg
    assert said.strip() == describe(plan(cfg, Prepared.open(data), 2)).strip()
    assert "table_wise" in said and "sent between workers in a step" in said
    assert not (tmp_path / "out").exists()
