"""Models that count: their scores against naive loops, and a run of one from the log to what it leaves."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from recsys_dist import session
from recsys_dist.baselines import history_scores
from recsys_dist.config import rng_for
from recsys_dist.data import stages
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import ConfigError
from recsys_dist.evaluate import EvaluateConfig, evaluate_recall, load_trained
from recsys_dist.models import itemcf, popularity
from recsys_dist.models.protocol import COUNTED, Catalogue, model_module, model_names
from recsys_dist.train import item_cosine, trainer
from recsys_dist.train.checkpoint import MANIFEST
from recsys_dist.train.settings import TrainConfig
from recsys_dist.train.validate import csr
from tests.batches import random_batch, small_catalogue, small_schema
from tests.conftest import Pair


@pytest.fixture
def cluster() -> Iterator[None]:
    session.connect(cpus=2)
    yield
    ray.shutdown()


def test_those_that_count_are_told_apart() -> None:
    assert {name for name in model_names() if getattr(model_module(name).Model, "counted", False)} == set(
        COUNTED
    )
    assert set(model_names(counted=False)) == set(model_names()) - set(COUNTED)


def test_itemcf_sums_the_cosines_of_each_distinct_item_of_the_past() -> None:
    cfg, rng = itemcf.Config(neighbours=5), rng_for(0, "counted")
    schema, positives = itemcf.Model.inputs(small_schema(), cfg), small_catalogue().positives
    items = len(positives)
    other_IM = rng.integers(0, items, (items, 5)).astype(np.int32)
    cosine_IM = (rng.random((items, 5)) * (other_IM > 0)).astype(np.float32)
    catalogue = Catalogue(positives, neighbours=(torch.from_numpy(other_IM), torch.from_numpy(cosine_IM)))
    model, batch = itemcf.Model(cfg, schema, catalogue).eval(), random_batch(schema, 30, rng).pad(33)
    found = model(batch).numpy()
    for row, past in enumerate(batch.sparse[model.past].to_dense()):
        expected = np.zeros(items)
        for item in set(past.tolist()):
            np.add.at(expected, other_IM[item], cosine_IM[item])
        np.testing.assert_allclose(found[row], expected, atol=2e-6)
        if not len(past):
            assert np.array_equal(np.argsort(-found[row], kind="stable")[:3], most_wanted(positives)[:3])
    assert model.item_vectors().shape == (items, 0)


def test_popularity_ranks_by_positives_then_by_row() -> None:
    positives = torch.tensor([9, 3, 7, 3, 0])
    schema = popularity.Model.inputs(small_schema(), None)
    model = popularity.Model(popularity.Config(), schema, Catalogue(positives))
    scores = model(random_batch(schema, 4, rng_for(1, "rows")))
    assert scores.shape == (4, 5) and bool((scores == scores[0]).all())
    assert scores[0].argsort(descending=True).tolist() == most_wanted(positives).tolist() == [0, 2, 1, 3, 4]


def most_wanted(positives: torch.Tensor) -> np.ndarray:
    return np.argsort(-positives.numpy(), kind="stable")


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_what_a_task_counts_comes_whole_however_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Data cuts what a task gives at its block size: an item's neighbours would be torn."""
    monkeypatch.setattr(ray.data.DataContext.get_current(), "target_max_block_size", 1000)
    tables = item_cosine._columns([5_000, 0, 7_000], lambda rows: pa.table({"number": np.arange(rows)}))
    found = sorted(len(number) for [number] in tables)
    assert found == [5_000, 7_000]


@pytest.mark.ray
@pytest.mark.e2e
@pytest.mark.usefixtures("cluster")
def test_a_run_of_itemcf_counts_what_its_phase_may_see(pair: Pair, tmp_path: Path) -> None:
    rows = len(pair.prepared.items) + 1
    cfg = TrainConfig.parse(
        {
            "data": str(pair.prepared.path),
            "model": {"name": "itemcf", "neighbours": rows + 3},
            "metric": "recall@5",
        }
    )
    lines: list[dict[str, object]] = []
    fitted = trainer.fit(cfg, tmp_path, on_report=lines.append)
    for phase, before in (("choose", "2024-03-07"), ("refit", "2024-03-08")):
        [checkpoint] = (fitted.run / phase).iterdir()
        model = load_trained(checkpoint, pair.prepared).model
        found = np.zeros((rows, rows))
        np.add.at(found, (np.arange(rows)[:, None], model.neighbour_IM.numpy()), model.cosine_IM.numpy())
        np.testing.assert_allclose(found, cosines(pair.prepared, before), atol=1e-6)
    users = evaluate_recall(
        pair.prepared,
        load_trained(next((fitted.run / "choose").iterdir()), pair.prepared),
        EvaluateConfig(split="valid", ks=(5,), bootstrap=2, item_pairs=0),
    )
    assert fitted.history[0]["recall@5"] == pytest.approx(users["model"]["unseen"]["recall@5"])
    assert [line["phase"] for line in lines] == ["choose", "refit"]

    assert trainer.fit(cfg, tmp_path).checkpoint == fitted.checkpoint, "what is finished is not counted again"
    (fitted.checkpoint / MANIFEST).unlink()
    assert trainer.fit(cfg, tmp_path).checkpoint != fitted.checkpoint
    assert len(list((fitted.run / "refit").iterdir())) == 1
    with pytest.raises(ConfigError, match="itemcf counts, and has no tables"):
        trainer.planned(cfg, pair.prepared)
    with pytest.raises(ConfigError, match="counts all of the training days, on CPUs: leave out newest_frac"):
        trainer.fit(cfg.override(["newest_fraction=0.5"]), tmp_path)
    with pytest.raises(ConfigError, match="counts, and starts from nothing: leave out item_vectors"):
        trainer.fit(cfg.override([f"item_vectors={fitted.run}"]), tmp_path)


def cosines(prepared: Prepared, before: str) -> np.ndarray:
    """[I, I] by loops over the events of the days before."""
    row_of = {item: row for row, item in enumerate(prepared.items["item_id"].to_pylist(), start=1)}
    shown: dict[str, set[int]] = {}
    for bucket in stages.bucket_numbers(prepared.path):
        for event in stages.read_bucket(prepared.path, bucket).to_pylist():
            if str(event["date"]) < before and event["item_id"] in row_of:
                shown.setdefault(event["user_id"], set()).add(row_of[event["item_id"]])
    incidence = np.zeros((len(shown), len(row_of) + 1))
    for user, items in enumerate(shown.values()):
        incidence[user, list(items)] = 1
    of_item = np.maximum(incidence.sum(axis=0), 1)
    found: np.ndarray = incidence.T @ incidence / np.sqrt(np.outer(of_item, of_item))
    np.fill_diagonal(found, 0)
    return found


def test_with_all_neighbours_it_is_the_baseline() -> None:
    """Of `recall.history_scores`, for a past that is all that a user has seen."""
    rng, items = rng_for(2, "baseline"), len(small_catalogue().positives)
    similar = np.triu(rng.random((items, items)), 1).astype(np.float32)
    similar += similar.T
    cfg = itemcf.Config(neighbours=items)
    schema = itemcf.Model.inputs(small_schema(), cfg)
    order = np.tile(np.arange(items, dtype=np.int32), (items, 1))
    catalogue = Catalogue(
        small_catalogue().positives, neighbours=(torch.from_numpy(order), torch.from_numpy(similar))
    )
    model, batch = itemcf.Model(cfg, schema, catalogue), random_batch(schema, 20, rng)
    past = batch.sparse[model.past]
    lists = pa.chunked_array([pa.array([ids.tolist() for ids in past.to_dense()], pa.list_(pa.int32()))])
    np.testing.assert_allclose(model(batch).numpy(), history_scores(*csr(lists), similar), atol=2e-5)
