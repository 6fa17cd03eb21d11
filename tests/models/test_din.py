"""DIN by its equations, and what it refuses."""

import numpy as np
import pytest
import torch
from torchrec import KeyedJaggedTensor

from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError
from recsys_dist.models import behaviours, din
from recsys_dist.models.layers import Dice
from recsys_dist.schema import Schema
from recsys_dist.train.sharding import materialise
from tests.batches import random_batch, small_schema
from tests.models.histories import batch_of, history_schema, numeric_gradient, random_history
from tests.models.test_recurrence import sigmoid

LENGTHS, WIDTH = [3, 0, 1, 4], 4
ROW = np.repeat(np.arange(len(LENGTHS)), LENGTHS)


def plain_unit(unit: behaviours.ActivationUnit, behaviour: np.ndarray, query: np.ndarray) -> np.ndarray:
    """[V] fig. 2: one hidden layer over [e_b, e_t, e_b - e_t, e_b * e_t], sigmoid, one output."""
    query = query[ROW]
    inputs = np.hstack([behaviour, query, behaviour - query, behaviour * query])
    first, second = (unit.mlp.layers[i] for i in (0, 2))
    weights = [value.detach().numpy() for value in (first.weight, first.bias, second.weight, second.bias)]
    return (sigmoid(inputs @ weights[0].T + weights[1]) @ weights[2].T + weights[3])[:, 0]


def test_local_activation_unit_and_its_gradient_are_those_of_the_equation() -> None:
    rng = rng_for(0, "unit")
    torch.manual_seed(0)
    unit = behaviours.ActivationUnit(WIDTH, (5,), "sigmoid").double()
    history = random_history(rng, LENGTHS, WIDTH)
    behaviour, query = history.behaviour_VE.detach().numpy(), history.query_BE.detach().numpy()
    found = unit(history, torch.ones(len(LENGTHS), dtype=torch.bool))
    np.testing.assert_allclose(found.detach(), plain_unit(unit, behaviour, query), rtol=1e-12)
    weight = rng.normal(size=len(ROW))
    (found * torch.from_numpy(weight)).sum().backward()
    for leaf, loss in (
        (history.behaviour_VE, lambda x: plain_unit(unit, x, query) @ weight),
        (history.query_BE, lambda x: plain_unit(unit, behaviour, x) @ weight),
    ):
        np.testing.assert_allclose(leaf.grad, numeric_gradient(loss, leaf.detach().numpy()), atol=1e-8)


def test_segments_sum_expand_and_softmax_are_their_numpy_twins() -> None:
    segments = behaviours.Segments(torch.tensor(LENGTHS), len(ROW))
    rng = rng_for(1, "segments")
    x, q, score = (
        rng.normal(size=(len(ROW), 2)),
        rng.normal(size=(len(LENGTHS), 2)),
        rng.normal(size=len(ROW)) * 50,
    )
    sums = np.array([x[row == ROW].sum(0) for row in range(len(LENGTHS))])
    np.testing.assert_allclose(segments.sum(torch.from_numpy(x)), sums, atol=1e-12)
    np.testing.assert_allclose(segments.expand(torch.from_numpy(q)), q[ROW])
    top = np.array([score[row == ROW].max(initial=-np.inf) for row in range(len(LENGTHS))])
    exp = np.exp(score - top[ROW])
    np.testing.assert_allclose(
        segments.softmax(torch.from_numpy(score)), exp / np.bincount(ROW, exp)[ROW], rtol=1e-12
    )
    for function, of in ((segments.sum, x), (segments.expand, q), (segments.softmax, score)):
        assert torch.autograd.gradcheck(function, torch.from_numpy(of / 50).requires_grad_())


@pytest.mark.parametrize("softmax", [False, True])
def test_history_is_summed_by_its_weights(softmax: bool) -> None:
    """Eq. 3 through the whole model: the tower is read out as a sum of its inputs."""
    cfg, schema = din.Config(embedding_dim=4, hidden=(), softmax=softmax, embedding_std=1.0), history_schema()
    torch.manual_seed(0)
    model = materialise(din.Model(cfg, schema), 0).eval()
    batch = batch_of(np.array([3, 4]), [[5, 6, 5], []], np.zeros(2))
    table = model.behaviours.tables.embedding_bags["item"].weight.detach().numpy()
    query, events = table[[3, 4]], table[[5, 6, 5]]
    unit = model.units[0]
    history = behaviours.History(
        torch.from_numpy(events), torch.from_numpy(query), behaviours.Segments(torch.tensor([3, 0]), 3)
    )
    weight = unit(history, batch.real).detach().numpy()
    if softmax:
        weight = np.exp(weight) / np.exp(weight).sum()
    pooled = np.array([weight @ events, np.zeros(4)])
    last = model.tower.layers[-1]
    expected = np.hstack([query, pooled]) @ last.weight.detach().numpy().T + last.bias.detach().numpy()
    np.testing.assert_allclose(model.logits(batch).detach(), expected, rtol=1e-5)


def test_sequences_that_are_not_attended_are_pooled() -> None:
    schema = small_schema()
    cfg = din.Config(histories=("watched",))
    torch.manual_seed(0)
    model = materialise(din.Model(cfg, din.Model.inputs(schema, cfg)), 0)
    assert [[f.name for f in group] for group in model.behaviours.groups] == [["watched"]]
    both = materialise(din.Model(din.Config(), schema), 0)
    assert [[f.name for f in group] for group in both.behaviours.groups] == [["watched", "watched_authors"]]
    assert both.behaviours.widths == [32] and any(isinstance(m, Dice) for m in both.units.modules())
    batch = random_batch(schema, 5, rng_for(0, "rows"))
    assert model(batch).shape == (5,)


def test_a_sequence_that_is_not_attended_beside_one_that_is_gives_its_mean() -> None:
    """Both are of items, and so looked up in one table."""
    plain = history_schema().model_dump()
    shown = {**plain["features"][1], "name": "shown", "where": None}
    schema = Schema.parse({**plain, "features": [*plain["features"], shown]})
    model = materialise(din.Model(din.Config(histories=("clicked",)), schema), 0)
    sparse = KeyedJaggedTensor(
        keys=["item", "clicked", "sessions", "shown"],
        values=torch.tensor([7, 8, 1, 2, 1, 1, 3, 4, 6], dtype=torch.int32),
        lengths=torch.tensor([1, 1, 2, 0, 2, 0, 3, 0], dtype=torch.int32),
    )
    batch = Batch(torch.zeros(2, 0), sparse, {"click": torch.ones(2)}, torch.ones(2), torch.arange(2))
    weight = model.behaviours.tables.embedding_bags["item"].weight
    fields, _ = model.behaviours(batch)
    expected = torch.cat([weight[[7, 8]], torch.stack([weight[[3, 4, 6]].mean(0), 0 * weight[0]])], dim=1)
    torch.testing.assert_close(fields, expected)


def test_a_schema_without_a_history_is_refused() -> None:
    plain = Schema.select(small_schema(), ["user", "item", "hour", "age"])
    with pytest.raises(ConfigError, match="din: attends to a history, and the features it reads have none"):
        din.Model.inputs(plain, din.Config())
    with pytest.raises(ConfigError, match=r"'watchd', which is no sequence.*did you mean 'watched'"):
        din.Model.inputs(small_schema(), din.Config(histories=("watchd",)))


@pytest.mark.parametrize("length", [0, 1, 10_000])
def test_histories_of_any_length(length: int) -> None:
    model = materialise(din.Model(din.Config(), history_schema(10_000)), 0)
    batch = batch_of(np.array([3]), [[1] * length], np.ones(1))
    loss = model.loss(batch, 0)
    loss.sum().backward()
    assert bool(torch.isfinite(loss).all())
