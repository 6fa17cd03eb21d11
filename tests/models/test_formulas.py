"""The equations of the layers written out in NumPy, in double precision, forward and backward.

B rows, H units of a layer
"""

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from scipy.special import erf
from torch import nn

from recsys_dist.config import rng_for
from recsys_dist.models.layers import MLP, Activation, BatchNorm, Dice
from recsys_dist.models.losses import binary_cross_entropy

Formula = Callable[[np.ndarray], np.ndarray]


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z))


def normal_cdf(z: np.ndarray) -> np.ndarray:
    return (1 + erf(z / np.sqrt(2))) / 2


def rectified(slope: float) -> tuple[Formula, Formula]:
    return lambda z: np.where(z > 0, z, slope * z), lambda z: np.where(z > 0, 1, slope)


# f and f' of every activation but Dice, whose knee depends on the batch
FORMULAS: dict[str, tuple[Formula, Formula]] = {
    "relu": rectified(0),
    "leaky_relu": rectified(0.01),
    "prelu": rectified(0.25),
    "gelu": (
        lambda z: z * normal_cdf(z),
        lambda z: normal_cdf(z) + z * np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi),
    ),
    "tanh": (np.tanh, lambda z: 1 - np.tanh(z) ** 2),
    "sigmoid": (sigmoid, lambda z: sigmoid(z) * (1 - sigmoid(z))),
}


def test_every_activation_has_its_formula_here() -> None:
    assert {*FORMULAS, "dice"} == set(get_args(Activation))


@pytest.mark.parametrize("name", FORMULAS)
def test_activation_and_its_derivative(name: Activation) -> None:
    function, derivative = FORMULAS[name]
    z = rng_for(0, name).normal(size=(50, 3)) * 3
    x = torch.tensor(z, requires_grad=True)
    layer = MLP(3, (3,), name).double().layers[1]
    out = layer(x)
    out.sum().backward()
    np.testing.assert_allclose(out.detach(), function(z), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(x.grad, derivative(z), rtol=1e-12, atol=1e-15)
    if name == "prelu":  # the slope is learned: dL/da is the sum of what lies left of the knee
        np.testing.assert_allclose(layer.weight.grad, [z[z <= 0].sum()], rtol=1e-12)


@pytest.mark.parametrize("name", FORMULAS)
def test_backpropagation_is_the_chain_rule(name: Activation) -> None:
    """δᴸ = sigmoid(z) - y,  δˡ = (δˡ⁺¹ Wˡ⁺¹) ∘ f'(zˡ),  dL/dWˡ = δˡᵀ aˡ⁻¹,  dL/dbˡ = Σ δˡ."""
    function, derivative = FORMULAS[name]
    rng = rng_for(1, name)
    torch.manual_seed(0)
    mlp = MLP(4, (6, 5, 3), name, out=1).double()
    linear = [layer for layer in mlp.layers if isinstance(layer, nn.Linear)]
    for layer in linear:
        nn.init.normal_(layer.bias)
    x, y = rng.normal(size=(7, 4)), rng.integers(0, 2, 7).astype(float)
    weights = [(layer.weight.detach().numpy(), layer.bias.detach().numpy()) for layer in linear]
    a, z = [x], []
    for w, b in weights:
        z.append(a[-1] @ w.T + b)
        a.append(function(z[-1]))
    delta = sigmoid(z[-1]) - y[:, None]
    expected = []
    for number in reversed(range(len(weights))):
        expected.append((delta.T @ a[number], delta.sum(axis=0)))
        delta = delta @ weights[number][0]
        if number:
            delta = delta * derivative(z[number - 1])

    inputs = torch.tensor(x, requires_grad=True)
    logit = mlp(inputs)
    binary_cross_entropy(logit[:, 0], torch.tensor(y)).sum().backward()
    np.testing.assert_allclose(logit.detach(), z[-1], rtol=1e-12)
    np.testing.assert_allclose(inputs.grad, delta, rtol=1e-9, atol=1e-15)
    for layer, (dw, db) in zip(linear, reversed(expected), strict=True):
        np.testing.assert_allclose(layer.weight.grad, dw, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(layer.bias.grad, db, rtol=1e-9, atol=1e-15)


def deep(activation: Activation, std: float | None = None) -> tuple[MLP, list[nn.Linear]]:
    """Ten layers of 64 with the start that fits the activation, or N(0, std²)."""
    torch.manual_seed(0)
    mlp = MLP(64, (64,) * 9, activation, out=64).double()
    linear = [layer for layer in mlp.layers if isinstance(layer, nn.Linear)]
    if std is not None:
        for layer in linear:
            nn.init.normal_(layer.weight, std=std)
    return mlp, linear


def first_to_last(activation: Activation) -> float:
    """Norm of the gradient of the first layer's weights, relative to that of the last layer's."""
    mlp, linear = deep(activation)
    mlp(torch.randn(256, 64, dtype=torch.float64)).square().mean().backward()
    norms = [float(layer.weight.grad.norm()) for layer in linear]
    return norms[0] / norms[-1]


def test_a_deep_sigmoid_net_vanishes_where_relu_with_its_start_does_not() -> None:
    """f' of a sigmoid is 1/4 at most: nine of them leave less than 1/4⁹ = 4e-6."""
    assert first_to_last("sigmoid") < 4e-6
    assert 0.2 < first_to_last("relu") < 5
    assert 0.05 < first_to_last("tanh") < 20


def test_a_start_that_does_not_fit_vanishes_or_explodes() -> None:
    """Going down, a ReLU layer multiplies the gradient's size by std·√(width/2), which He's start makes 1."""
    for std, least, most in ((0.01, 0, 1e-10), (0.5, 1e3, np.inf)):  # 0.057 and 2.8 a layer
        found = input_gradient(std)
        assert least < found < most
        assert 0.3 < found / (std * np.sqrt(64 / 2)) ** 9 / (std * np.sqrt(64)) < 3
    assert 0.3 < input_gradient(None) < 3


def input_gradient(std: float | None) -> float:
    """Root mean square that a unit gradient above the last layer has below the first."""
    mlp, _ = deep("relu", std)
    x = torch.randn(256, 64, dtype=torch.float64, requires_grad=True)
    out = mlp(x)
    (gradient,) = torch.autograd.grad(out, x, torch.randn_like(out))
    return float(gradient.square().mean().sqrt())


REAL = np.array([True, True, False, True, True, False, True])  # rows of a batch; the others are padding


def rows_with_padding(*key: str | int) -> np.ndarray:
    x = rng_for(3, *key).normal(size=(len(REAL), 4)) * 2 + 5
    x[~REAL] = 1e3  # padding must not matter, whatever it holds
    return x


def test_batch_norm_is_its_equations() -> None:
    """Ioffe & Szegedy 2015, algorithm 1, and the derivatives below it; padding counts for nothing."""
    x, up = rows_with_padding("x"), rng_for(3, "up").normal(size=(len(REAL), 4)) * REAL[:, None]
    norm = BatchNorm(4).double()
    scale, shift = rng_for(3, "scale").normal(size=4), rng_for(3, "shift").normal(size=4)
    with torch.no_grad():
        norm.scale.copy_(torch.tensor(scale))
        norm.shift.copy_(torch.tensor(shift))
    inputs = torch.tensor(x, requires_grad=True)
    out = norm(inputs, torch.tensor(REAL))
    (out * torch.tensor(up)).sum().backward()

    m, kept, dy = REAL.sum(), x[REAL], up[REAL]
    mean, variance = kept.mean(axis=0), kept.var(axis=0)
    root = np.sqrt(variance + 1e-5)
    hat = (kept - mean) / root
    np.testing.assert_allclose(out.detach()[REAL], hat * scale + shift, rtol=1e-10)
    d_hat = dy * scale
    d_variance = (d_hat * (kept - mean)).sum(axis=0) * -0.5 * root**-3
    d_mean = -(d_hat / root).sum(axis=0) + d_variance * (-2 * (kept - mean)).mean(axis=0)
    expected = np.zeros_like(x)
    expected[REAL] = d_hat / root + d_variance * 2 * (kept - mean) / m + d_mean / m
    np.testing.assert_allclose(inputs.grad, expected, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(norm.scale.grad, (dy * hat).sum(axis=0), rtol=1e-9)
    np.testing.assert_allclose(norm.shift.grad, dy.sum(axis=0), rtol=1e-9)


def test_batch_norm_remembers_what_it_saw_for_evaluation() -> None:
    """Running moments: a tenth of each batch's mean and unbiased variance; of no empty one, or with a NaN."""
    norm = BatchNorm(4).double()
    mean, variance = np.zeros(4), np.ones(4)
    for step in range(3):
        x = rows_with_padding(step)
        norm(torch.tensor(x), torch.tensor(REAL))
        mean += 0.1 * (x[REAL].mean(axis=0) - mean)
        variance += 0.1 * (x[REAL].var(axis=0, ddof=1) - variance)
    norm(torch.tensor(x), torch.zeros(len(x), dtype=torch.bool))
    norm(torch.tensor(np.where(x == x[REAL].max(), np.nan, x)), torch.tensor(REAL))
    np.testing.assert_allclose(norm.mean, mean, rtol=1e-12)
    np.testing.assert_allclose(norm.variance, variance, rtol=1e-12)
    norm.eval()
    np.testing.assert_allclose(
        norm(torch.tensor(x)).detach(), (x - mean) / np.sqrt(variance + 1e-5), rtol=1e-12
    )
    np.testing.assert_allclose(norm.mean, mean, rtol=1e-12)


def dice(s: np.ndarray, alpha: np.ndarray, moments: tuple[np.ndarray, np.ndarray] | None) -> np.ndarray:
    """DIN, equation 3, over real rows; `moments` of evaluation, else the batch's own."""
    mean, variance = moments or (s.mean(axis=0), s.var(axis=0))
    p = sigmoid((s - mean) / np.sqrt(variance + 1e-8))
    return p * s + (1 - p) * alpha * s


def central(function: Formula, at: np.ndarray) -> np.ndarray:
    """Gradient of a scalar function by central differences."""
    gradient, step = np.zeros_like(at), 1e-5
    for index in np.ndindex(at.shape):
        moved = np.zeros_like(at)
        moved[index] = step
        gradient[index] = (function(at + moved) - function(at - moved)) / (2 * step)
    return gradient


@pytest.mark.parametrize("training", [True, False])
def test_dice_is_equation_3(training: bool) -> None:
    x, up = rows_with_padding("dice"), rng_for(3, "dice up").normal(size=(len(REAL), 4)) * REAL[:, None]
    alpha = rng_for(3, "alpha").normal(size=4)
    layer = Dice(4).double().train(training)
    with torch.no_grad():
        layer.alpha.copy_(torch.tensor(alpha))
        layer.norm.mean.fill_(4)
        layer.norm.variance.fill_(3)
    moments = None if training else (np.full(4, 4.0), np.full(4, 3.0))
    inputs = torch.tensor(x, requires_grad=True)
    out = layer(inputs, torch.tensor(REAL))
    (out * torch.tensor(up)).sum().backward()
    np.testing.assert_allclose(out.detach()[REAL], dice(x[REAL], alpha, moments), rtol=1e-10)
    expected = np.zeros_like(x)
    expected[REAL] = central(lambda s: (dice(s, alpha, moments) * up[REAL]).sum(), x[REAL])
    np.testing.assert_allclose(inputs.grad, expected, rtol=1e-6, atol=1e-8)
    of_alpha = central(lambda a: (dice(x[REAL], a, moments) * up[REAL]).sum(), alpha)
    np.testing.assert_allclose(layer.alpha.grad, of_alpha, rtol=1e-6, atol=1e-8)
