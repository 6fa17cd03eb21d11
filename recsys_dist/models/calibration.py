"""Calibration: an increasing map of logits, after which probabilities are right (`train.calibrate` fits it).

N rows, K knots
"""

import numpy as np
import torch
from torch import nn

KNOTS = 32  # K
Points = list[list[float]]  # (logit, calibrated logit), both strictly ascending; empty: the identity


class Calibration(nn.Module):
    """A line through knots, part of a ranker's state; the identity until `set`. It changes no order."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("x_K", torch.arange(KNOTS, dtype=torch.float64))
        self.register_buffer("y_K", torch.arange(KNOTS, dtype=torch.float64))
        self.x_K: torch.Tensor
        self.y_K: torch.Tensor

    def set(self, points: Points) -> None:
        """Take the map through at most K `points`; beyond the last ones it goes on with a slope of 1."""
        x, y = np.array(points, np.float64).reshape(-1, 2).T if len(points) else np.zeros((2, 1))
        beyond = np.arange(1, KNOTS + 1 - len(x))
        self.x_K.copy_(torch.from_numpy(np.r_[x, x[-1] + beyond]))
        self.y_K.copy_(torch.from_numpy(np.r_[y, y[-1] + beyond]))

    @property
    def changes(self) -> bool:
        """Whether it is another map than the identity."""
        return not torch.equal(self.x_K, self.y_K)

    def forward(self, logit_N: torch.Tensor) -> torch.Tensor:
        """[N] logits → [N] calibrated logits."""
        z = logit_N.double()
        at = (torch.searchsorted(self.x_K, z) - 1).clamp(0, KNOTS - 2)
        x, y = self.x_K[at], self.y_K[at]
        slope = (self.y_K[at + 1] - y) / (self.x_K[at + 1] - x)
        inside = (z >= self.x_K[0]) & (z <= self.x_K[-1])
        outside = torch.where(z < self.x_K[0], self.y_K[0] - self.x_K[0], self.y_K[-1] - self.x_K[-1])
        return torch.where(inside, y + (z - x) * slope, z + outside).to(logit_N.dtype)
