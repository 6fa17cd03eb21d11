"""What stays in 32 bits where autocast has matrix products in 16: statistics, losses, functions by hand."""

from typing import Any

import torch


def full(x: torch.Tensor) -> torch.Tensor:
    """`x` with at least 32 bits a number, differentiable."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def by_hand(function: type[torch.autograd.Function], *args: Any) -> Any:
    """`function.apply` of these, on one device all: it sees no autocast, and no floats of 16 bits."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    with torch.autocast(tensors[0].device.type, enabled=False):
        found = [full(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
        return function.apply(*found)  # type: ignore[no-untyped-call]
