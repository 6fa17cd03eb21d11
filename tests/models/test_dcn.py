"""Each form of the cross layer against its equation, and what a cross network can tell apart."""

import numpy as np
import pytest
import torch

from recsys_dist.errors import ConfigError
from recsys_dist.models.dcn import Config, Model, cross_layer
from tests.batches import small_schema
from tests.models.formula import Arrays, agrees, linear

ROWS, INPUTS = 3, 5


def vector(a: Arrays) -> np.ndarray:
    return np.stack(
        [x0 * (x @ a["weight_I"]) + a["bias_I"] + x for x0, x in zip(a["x0_BI"], a["x_BI"], strict=True)]
    )


def matrix(a: Arrays) -> np.ndarray:
    return a["x0_BI"] * (a["x_BI"] @ a["up.weight"].T + a["up.bias"]) + a["x_BI"]


def low_rank(a: Arrays) -> np.ndarray:
    whole = a["up.weight"] @ a["down.weight"]  # U Vᵀ
    return a["x0_BI"] * (a["x_BI"] @ whole.T + a["up.bias"]) + a["x_BI"]


def mixture(a: Arrays) -> np.ndarray:
    rows = []
    for x0, x in zip(a["x0_BI"], a["x_BI"], strict=True):
        gate = np.exp(linear(a, "gate", x))
        experts = [
            x0 * (np.tanh(np.tanh(x @ v) @ c) @ u + a["bias_I"])
            for v, c, u in zip(a["down_KIR"], a["inner_KRR"], a["up_KRI"], strict=True)
        ]
        rows.append(sum(g * e for g, e in zip(gate / gate.sum(), experts, strict=True)) + x)
    return np.stack(rows)


@pytest.mark.parametrize(
    ("cfg", "equation"),
    [
        (Config(form="vector"), vector),
        (Config(form="matrix"), matrix),
        (Config(form="matrix", rank=2), low_rank),
        (Config(form="mixture", rank=2, experts=3), mixture),
    ],
)
def test_a_cross_layer_is_its_equation(cfg: Config, equation) -> None:
    torch.manual_seed(0)
    layer = cross_layer(cfg, INPUTS).double()
    x0, x = torch.randn(2, ROWS, INPUTS, dtype=torch.double)
    agrees(layer, {"x0_BI": x0, "x_BI": x}, equation)


def test_two_vector_layers_hold_products_of_three_inputs() -> None:
    """The degree grows by one a layer (theorem 3.1): higher differences along a line vanish."""
    torch.manual_seed(1)
    layers = [cross_layer(Config(form="vector"), INPUTS).double() for _ in range(3)]
    base, direction = torch.randn(2, INPUTS, dtype=torch.double)
    points = torch.stack([base + t * direction for t in range(5)])
    for depth, degree in ((2, 3), (3, 4)):
        x = points
        for layer in layers[:depth]:
            x = layer(points, x)
        for order in range(1, 5):
            differences = np.abs(np.diff(x.detach().numpy(), order, axis=0)).max()
            assert (differences < 1e-9) == (order > degree)


def test_structures_join_or_stack() -> None:
    inputs = 7 * 16 + 2
    parallel = Model(Config(hidden=(8,)), small_schema())
    stacked = Model(Config(hidden=(8,), structure="stacked"), small_schema())
    assert parallel.score.layers[0].in_features == inputs + 8 and stacked.score.layers[0].in_features == 8


def test_rank_of_a_vector_is_refused() -> None:
    with pytest.raises(ConfigError, match="rank has no meaning"):
        Config.parse({"form": "vector", "rank": 4})
