"""Holds a module against its equation in plain NumPy: values, and gradients by central differences."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import nn

from recsys_dist.config import rng_for

Arrays = Mapping[str, np.ndarray]
_STEP = 1e-6
_PROBED = 12  # coordinates of each parameter whose derivative is compared


def agrees(
    module: nn.Module, given: Mapping[str, torch.Tensor], equation: Callable[[Arrays], np.ndarray]
) -> None:
    """`module(**given)` and `equation` of parameters, buffers and inputs by name are one function.

    The module must be in double precision. Compared are outputs, and derivatives of a random
    projection of them with respect to some coordinates of every parameter and floating input.
    """
    inputs = {name: x.requires_grad_(x.is_floating_point()) for name, x in given.items()}
    out = module(**inputs)
    arrays = {name: p.detach().numpy().copy() for name, p in [*module.named_parameters(), *inputs.items()]}
    expected = equation(arrays)
    np.testing.assert_allclose(out.detach().numpy(), expected, rtol=1e-9, atol=1e-12)
    rng = rng_for(0, "formula")
    cotangent = rng.normal(size=expected.shape)
    (out * torch.from_numpy(cotangent)).sum().backward()
    for name, tensor in [*module.named_parameters(), *inputs.items()]:
        if not tensor.requires_grad or tensor.numel() == 0:
            continue
        gradient = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.numpy()
        for at in rng.choice(tensor.numel(), min(_PROBED, tensor.numel()), replace=False):
            numeric = _derivative(lambda: (equation(arrays) * cotangent).sum(), arrays[name], at)
            assert np.isclose(gradient.flat[at], numeric, rtol=1e-5, atol=1e-7), (name, at)


def _derivative(value: Callable[[], float], array: np.ndarray, at: int) -> float:
    kept = array.flat[at]
    array.flat[at] = kept + _STEP
    above = value()
    array.flat[at] = kept - _STEP
    below = value()
    array.flat[at] = kept
    return (above - below) / (2 * _STEP)


def linear(arrays: Arrays, name: str, x: np.ndarray) -> np.ndarray:
    """W x + b of the layer called `name`; without b where it has none."""
    out = x @ arrays[f"{name}.weight"].T
    return out + arrays[f"{name}.bias"] if f"{name}.bias" in arrays else out
