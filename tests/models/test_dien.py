"""DIEN by its equations, and by a drift of interest that only the order of behaviours tells."""

from typing import Any

import numpy as np
import pytest
import torch

from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.models import dien
from recsys_dist.models.protocol import model_module
from recsys_dist.train.sharding import materialise
from tests.models.histories import ITEMS, batch_of, history_schema, numeric_gradient, random_history
from tests.models.test_contract import outputs, train
from tests.models.test_recurrence import sigmoid

LENGTHS, WIDTH = [3, 0, 1, 4], 4
ROW = np.repeat(np.arange(len(LENGTHS)), LENGTHS)
FIRST = np.cumsum([0, *LENGTHS])


def plain_gru(gru: dien.GRU, x: np.ndarray, attention: np.ndarray, open_gate: bool = False) -> np.ndarray:
    """[V, E] states of eq. 2-5; the update gate times the attention, or with `open_gate` the attention."""
    gates, bias = (value.detach().numpy() for value in (gru.inputs.weight, gru.inputs.bias))
    recurrent = gru.recurrent_GH.detach().numpy()
    out = np.zeros_like(x)
    for row, length in enumerate(LENGTHS):
        h = np.zeros(WIDTH)
        for t in range(FIRST[row], FIRST[row] + length):
            of_x, of_h = np.split(gates @ x[t] + bias, 3), np.split(recurrent @ h, 3)
            update = attention[t] * (1 if open_gate else sigmoid(of_x[1] + of_h[1]))
            new = np.tanh(of_x[2] + sigmoid(of_x[0] + of_h[0]) * of_h[2])
            h = out[t] = (1 - update) * h + update * new
    return out


def plain_interest(interest: dien.Interest, behaviour: np.ndarray, query: np.ndarray) -> np.ndarray:
    """[B, E] eq. 8 and the evolution by name."""
    state = plain_gru(interest.extractor, behaviour, np.ones(len(behaviour)))
    exp = np.exp(np.einsum("ve,ef,vf->v", state, interest.attention_EE.detach().numpy(), query[ROW]))
    attention = exp / np.bincount(ROW, exp)[ROW]
    match interest.evolution:
        case "aigru":
            evolved = plain_gru(interest.evolving, state * attention[:, None], np.ones(len(state)))
        case "agru":
            evolved = plain_gru(interest.evolving, state, attention, open_gate=True)
        case "augru":
            evolved = plain_gru(interest.evolving, state, attention)
    return np.array([evolved[FIRST[b + 1] - 1] if n else np.zeros(WIDTH) for b, n in enumerate(LENGTHS)])


@pytest.mark.parametrize("evolution", ["augru", "agru", "aigru"])
def test_interest_and_its_gradient_are_those_of_the_equations(evolution: dien.Evolution) -> None:
    rng = rng_for(0, "interest")
    torch.manual_seed(0)
    interest = dien.Interest(WIDTH, evolution).double()
    history = random_history(rng, LENGTHS, WIDTH)
    behaviour, query = history.behaviour_VE.detach().numpy(), history.query_BE.detach().numpy()
    found, _ = interest(history)
    np.testing.assert_allclose(found.detach(), plain_interest(interest, behaviour, query), rtol=1e-10)
    weight = rng.normal(size=found.shape)
    (found * torch.from_numpy(weight)).sum().backward()
    for leaf, loss in (
        (history.behaviour_VE, lambda x: (plain_interest(interest, x, query) * weight).sum()),
        (history.query_BE, lambda x: (plain_interest(interest, behaviour, x) * weight).sum()),
    ):
        np.testing.assert_allclose(leaf.grad, numeric_gradient(loss, leaf.detach().numpy()), atol=1e-8)


def test_auxiliary_loss_is_its_equation_and_no_row_leaks_into_the_next() -> None:
    history = random_history(rng_for(1, "auxiliary"), LENGTHS, WIDTH)
    state = torch.from_numpy(rng_for(2, "states").normal(size=(len(ROW), WIDTH))).requires_grad_()
    assert history.negative_VE is not None
    behaviour, negative = history.behaviour_VE.detach().numpy(), history.negative_VE.detach().numpy()

    def plain(h: np.ndarray) -> np.ndarray:
        losses = np.zeros(len(LENGTHS))
        for row, length in enumerate(LENGTHS):
            for t in range(FIRST[row], FIRST[row] + length - 1):
                right, wrong = sigmoid(h[t] @ behaviour[t + 1]), sigmoid(h[t] @ negative[t + 1])
                losses[row] -= (np.log(right) + np.log(1 - wrong)) / (length - 1)
        return losses

    found = dien.auxiliary_loss(state, history)
    np.testing.assert_allclose(found.detach(), plain(state.detach().numpy()), rtol=1e-12)
    assert found[1] == found[2] == 0  # no behaviour, and one that nothing follows
    found.sum().backward()
    expected = numeric_gradient(lambda h: plain(h).sum(), state.detach().numpy())
    np.testing.assert_allclose(state.grad, expected, atol=1e-8)


def test_negatives_are_other_items_and_the_rows_own() -> None:
    ids = torch.arange(5, dtype=torch.int32).repeat(2000)
    drawn = dien.others(dien.hashed(torch.arange(10_000)), ids, 5)
    assert not bool((drawn == ids).any())
    counts = torch.bincount(ids.long() * 5 + drawn, minlength=25).view(5, 5).float()
    assert counts[~torch.eye(5, dtype=torch.bool)].sub(500).abs().max() < 100  # uniform over the four others
    model, rng = build("dien"), rng_for(3, "rows")
    clicked = [rng.integers(1, ITEMS, 4) for _ in range(6)]
    batch = batch_of(np.arange(6), clicked, np.zeros(6))
    later = batch_of(np.arange(3), clicked[3:], np.zeros(3))
    later.row_id.copy_(batch.row_id[3:])
    whole, part = (model._negatives(b, 7)["clicked"] for b in (batch, later))
    assert torch.equal(whole[12:], part) and not torch.equal(whole, model._negatives(batch, 8)["clicked"])


def build(name: str, max_length: int = 50) -> Any:
    module = model_module(name)
    cfg, schema = module.Config(embedding_dim=8, hidden=(32,)), history_schema(max_length)
    torch.manual_seed(0)
    return materialise(module.Model(cfg, module.Model.inputs(schema, cfg)), 0)


def drifting(rows: int, seed: int) -> Batch:
    """Three items of one half of the catalogue, then three of the other: a click goes with the latter."""
    rng = rng_for(seed, "drift")
    half, latest = (ITEMS - 1) // 2, rng.integers(0, 2, rows)
    of_item = rng.integers(0, 2, rows)
    earlier, later = (rng.integers(1, half + 1, (rows, 3)) for _ in range(2))
    clicked = np.hstack([earlier + half * (1 - latest[:, None]), later + half * latest[:, None]])
    item = rng.integers(1, half + 1, rows) + half * of_item
    return batch_of(item, clicked.tolist(), of_item == latest)


def test_a_drifting_interest_is_seen_by_dien_and_not_by_din() -> None:
    right = {}
    for name in ("din", "dien"):
        model = build(name)
        train(model, drifting(800, 0), steps=60)
        held_out = drifting(1000, 1)
        right[name] = ((outputs(model, held_out) > 0) == (held_out.labels["click"] > 0)).float().mean()
    assert right["dien"] > 0.9 and 0.42 < right["din"] < 0.58
