"""Recurrences by their equations, one row and one step at a time in NumPy; gradients by differences."""

import numpy as np
import pytest
import torch

from recsys_dist.config import rng_for
from recsys_dist.models.behaviours import Segments
from recsys_dist.models.recurrence import Packing, gru
from tests.models.histories import numeric_gradient

LENGTHS, WIDTH = [2, 0, 5, 1, 3], 3
TOKENS = sum(LENGTHS)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def states(x_VG: np.ndarray, recurrent_GH: np.ndarray, attention_V: np.ndarray) -> np.ndarray:
    """DIEN eq. 2-5 and 14-15, as printed."""
    of_reset, of_update, of_new = np.split(recurrent_GH, 3)
    out = []
    for first, length in zip(np.cumsum([0, *LENGTHS]), LENGTHS, strict=False):
        h = np.zeros(WIDTH)
        for t in range(first, first + length):
            x_reset, x_update, x_new = np.split(x_VG[t], 3)
            reset = sigmoid(x_reset + of_reset @ h)
            update = attention_V[t] * sigmoid(x_update + of_update @ h)
            new = np.tanh(x_new + reset * (of_new @ h))
            h = (1 - update) * h + update * new
            out.append(h)
    return np.array(out)


@pytest.mark.parametrize("attended", [False, True])
def test_states_and_gradients_are_those_of_the_equations(attended: bool) -> None:
    rng = rng_for(0, "gru")
    x, recurrent = rng.normal(size=(TOKENS, 3 * WIDTH)), rng.normal(size=(3 * WIDTH, WIDTH))
    attention = rng.random(TOKENS) if attended else np.ones(TOKENS)
    weight = rng.normal(size=(TOKENS, WIDTH))
    given = [torch.from_numpy(value).requires_grad_() for value in (x, recurrent, attention)]
    packing = Packing(Segments(torch.tensor(LENGTHS), TOKENS))
    found = gru(given[0], given[1], packing, given[2] if attended else None)
    np.testing.assert_allclose(found.detach(), states(x, recurrent, attention), rtol=1e-12)
    (found * torch.from_numpy(weight)).sum().backward()
    for at in range(3 if attended else 2):

        def loss(moved: np.ndarray, at: int = at) -> float:
            return float(
                (
                    states(*[moved if i == at else v for i, v in enumerate((x, recurrent, attention))])
                    * weight
                ).sum()
            )

        expected = numeric_gradient(loss, (x, recurrent, attention)[at])
        np.testing.assert_allclose(given[at].grad, expected, atol=1e-8)


def test_no_tokens_at_all() -> None:
    x = torch.zeros(0, 9, requires_grad=True)
    found = gru(x, torch.zeros(9, 3, requires_grad=True), Packing(Segments(torch.tensor([0, 0]), 0)))
    assert found.shape == (0, 3)
    found.sum().backward()
