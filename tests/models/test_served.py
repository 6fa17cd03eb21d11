"""Every model from prepared data to answers: trained on the small log, exported, opened again, and asked."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
import torch

from recsys_dist.bundle import Bundle
from recsys_dist.data.collate import collate
from recsys_dist.data.examples import World, features
from recsys_dist.export import export
from recsys_dist.models.protocol import COUNTED, model_module, model_names
from recsys_dist.serve.api import RecommendRequest
from recsys_dist.serve.recommend import Recommender
from recsys_dist.train import trainer
from recsys_dist.train.checkpoint import load_for_inference
from tests import bundles
from tests.conftest import Pair


@pytest.fixture
def cluster_ends() -> Iterator[None]:
    """What counts goes over a cluster, which it starts."""
    yield
    ray.shutdown()


def trained(name: str, pair: Pair, root: Path) -> dict[str, Path]:
    if name not in COUNTED:
        return bundles.train(pair.prepared, root, {model_module(name).Model.task: {"name": name}})
    return {
        "recall": trainer.fit(bundles.config(pair.prepared, "recall", model={"name": name}), root).checkpoint
    }


@pytest.mark.usefixtures("cluster_ends")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.ray] * (name in COUNTED)) for name in model_names()]
)
def test_what_was_trained_is_what_answers(name: str, pair: Pair, tmp_path: Path) -> None:
    task = model_module(name).Model.task
    checkpoints = {**pair.checkpoints, **trained(name, pair, tmp_path)}
    opened = Bundle.open(export(pair.prepared, checkpoints, pair.evaluations, tmp_path / "bundles").path)

    served, (model, _) = getattr(opened, task), load_for_inference(checkpoints[task])
    world = World(opened.encoders, opened.users, opened.items)
    rows = features(opened.events, world, np.arange(len(opened.events)))
    batch = collate(pa.table(rows), served.schema)
    with torch.no_grad():
        torch.testing.assert_close(served.model(batch), model(batch), rtol=0, atol=0)
        if task == "recall":
            np.testing.assert_array_equal(opened.item_vectors, model.item_vectors().numpy())

    asked = RecommendRequest(user_id=opened.events["user_id"][0].as_py(), k=5)
    [answer] = asyncio.run(Recommender(opened).recommend([asked], budget_ms=60_000))
    of = "expected_value" if opened.ranking.model.predicts else "probability"
    predicted = [value for item in answer.items if (value := getattr(item, of)) is not None]
    assert len(answer.items) == 5 and not {"ranking_failed", "recall_failed"} & set(answer.degraded)
    assert predicted and predicted == sorted(predicted, reverse=True)
