"""FTRL-Proximal for linear weights (McMahan et al. 2013, KDD, doi 10.1145/2487575.2488200, algorithm 1).

    s = (√(n + g²) - √n) / lr,    z ← z + g - s·w,    n ← n + g²
    w = 0 where |z| ≤ l1, else -(z - sgn(z)·l1) / ((beta + √n) / lr + l2)

with the paper's alpha as lr, and its lambda1 and lambda2 as l1 and l2.

R rows of a table, T of them touched by a batch, C columns
"""

from collections.abc import Iterable

import torch
from torch import nn


class FTRL(torch.optim.Optimizer):
    """A row of the table is one coordinate: a weight that is the mean of its C equal columns.

    So its gradient is C times that of a column (exactly so in floats where C is a power of two). Weights
    must start at 0, as z and n do. Rows without a gradient stay: the rule would not move them.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, beta: float, l1: float, l2: float) -> None:
        super().__init__(params, {"lr": lr, "beta": beta, "l1": l1, "l2": l2})
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["sum"] = weight.detach().new_zeros(len(weight), 2)  # z and n of each row

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step of all weights that have a gradient."""
        assert closure is None, "nothing here evaluates the model again"
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    _step(weight.detach(), weight.grad, self.state[weight]["sum"], group)


def _step(
    weight_RC: torch.Tensor, gradient_RC: torch.Tensor, sums_R2: torch.Tensor, rule: dict[str, float]
) -> None:
    columns = weight_RC.shape[1]
    touched_T = gradient_RC[:, 0].nonzero().squeeze(1)
    g_T = gradient_RC[touched_T, 0] * columns
    w_T = weight_RC[touched_T, 0]
    z_T, n_T = sums_R2[touched_T].unbind(1)
    root_T, n_T = n_T.sqrt(), n_T + g_T.square()
    z_T = z_T + g_T - (n_T.sqrt() - root_T) / rule["lr"] * w_T
    shrunk_T = torch.sgn(z_T) * (z_T.abs() - rule["l1"]).clamp(min=0)
    w_T = -shrunk_T / ((rule["beta"] + n_T.sqrt()) / rule["lr"] + rule["l2"])
    sums_R2[touched_T] = torch.stack([z_T, n_T], dim=1)
    weight_RC[touched_T] = w_T[:, None].expand(-1, columns)
