"""item2vec against its equation, a pair at a time in NumPy; users as means of their items."""

import numpy as np
import pytest
import torch

from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError
from recsys_dist.models.item2vec import Config, Model
from recsys_dist.models.protocol import Catalogue
from recsys_dist.schema import Schema
from recsys_dist.train.sharding import materialise
from tests.batches import random_batch, small_schema

COUNTS = np.arange(40)
CFG = Config(dim=8, window=2, negatives=9, negatives_per_pair=3, subsample=0.02, embedding_std=0.5)


@pytest.fixture(scope="module")
def model() -> Model:
    return materialise(Model(CFG, inputs(), Catalogue(torch.from_numpy(COUNTS))), 0)


def inputs() -> Schema:
    return Model.inputs(small_schema(), CFG)


def histories(batch: Batch) -> list[list[int]]:
    return [ids.tolist() or [0] for ids in batch.sparse["watched"].to_dense()]


def tables(model: Model) -> tuple[np.ndarray, np.ndarray]:
    u, v = (model.tables.embeddings[name].weight for name in ("item", "context_item"))
    return u.detach().double().numpy(), v.detach().double().numpy()


def numpy_loss(u: np.ndarray, v: np.ndarray, items: list[int], drawn: np.ndarray) -> float:
    """Of one user's sequence, by a loop over its pairs."""
    keep = [1.0, *np.minimum(1, np.sqrt(0.02 / (COUNTS[1:] / COUNTS.sum())))]
    total = 0.0
    for a, i in enumerate(items):
        for b, j in enumerate(items):
            if 0 < abs(a - b) <= 2 and j != 0:
                negatives = np.log(1 / (1 + np.exp(v[drawn] @ u[i]))).mean()
                total -= keep[i] * keep[j] * (np.log(1 / (1 + np.exp(-u[i] @ v[j]))) + 3 * negatives)
    return total / 5


def test_loss_is_that_of_all_pairs_in_the_window(model: Model) -> None:
    batch = random_batch(inputs(), 9, rng_for(0, "rows"), {"item": np.array([0, *range(5, 13)])})
    drawn = model.negatives.draw(4).numpy()
    sequences = [[*past, item] for past, item in zip(histories(batch), [0, *range(5, 13)], strict=True)]
    assert max(map(len, sequences)) == 6 and min(map(len, sequences)) == 2
    expected = [numpy_loss(*tables(model), items, drawn) for items in sequences]
    losses = model.loss(batch, 4)
    np.testing.assert_allclose(losses.detach().numpy(), expected, rtol=1e-5)

    model.zero_grad()
    losses.sum().backward()
    rng = rng_for(1, "direction")
    (u, v), (du, dv) = tables(model), rng.normal(size=(2, 40, 8))
    weights = [
        model.tables.embeddings[name].weight.grad.double().numpy() for name in ("item", "context_item")
    ]
    slope = (weights[0] * du).sum() + (weights[1] * dv).sum()
    ends = [sum(numpy_loss(u + e * du, v + e * dv, s, drawn) for s in sequences) for e in (1e-6, -1e-6)]
    assert slope == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4)


def test_users_are_the_mean_direction_of_their_items(model: Model) -> None:
    batch = random_batch(inputs(), 9, rng_for(2, "rows"))
    unit = tables(model)[0] / np.linalg.norm(tables(model)[0], axis=1, keepdims=True)
    np.testing.assert_allclose(model.item_vectors().detach().numpy(), unit, rtol=1e-5, atol=1e-7)
    summed = np.array([unit[items].sum(axis=0) for items in histories(batch)])
    expected = summed / np.linalg.norm(summed, axis=1, keepdims=True)
    np.testing.assert_allclose(model(batch).detach().numpy(), expected, rtol=1e-4, atol=1e-6)


def test_users_may_be_compared_with_contexts() -> None:
    cfg = Config(**{**CFG.model_dump(), "score": "contexts"})
    model = materialise(Model(cfg, inputs(), Catalogue(torch.from_numpy(COUNTS))), 0)
    batch = random_batch(inputs(), 9, rng_for(2, "rows"))
    (u, v), users = tables(model), model(batch).detach().numpy()
    np.testing.assert_allclose(
        users, [u[items].mean(axis=0) for items in histories(batch)], rtol=1e-4, atol=1e-6
    )
    np.testing.assert_allclose(model.item_vectors().detach().numpy(), v, rtol=1e-6)


def test_items_of_the_same_sequences_come_to_lie_together() -> None:
    """Two kinds of items that never meet; items of a kind meet at random."""
    cfg = Config(dim=8, subsample=1.0)
    model = materialise(Model(cfg, inputs(), Catalogue(torch.full((40,), 25))), 0)
    rng = rng_for(3, "kinds")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(60):
        item = rng.integers(1, 40, 300)
        past = 1 + (item - 1 + 2 * rng.integers(1, 19, 300)) % 38  # of the same parity
        batch = random_batch(inputs(), 300, rng, {"item": np.where(item == 39, past, item), "watched": past})
        optimizer.zero_grad()
        model.loss(batch, step).mean().backward()
        optimizer.step()
    similar = (model.item_vectors() @ model.item_vectors().T).detach().numpy()[1:39, 1:39]
    kind = np.arange(38) % 2
    others = ~np.eye(38, dtype=bool)
    assert similar[(kind[:, None] == kind) & others].min() > similar[kind[:, None] != kind].max()


def test_needs_a_sequence_of_item_ids() -> None:
    with pytest.raises(ConfigError, match="item2vec: needs a sequence of item ids"):
        Model.inputs(small_schema().select(["item", "user"]), Config())
