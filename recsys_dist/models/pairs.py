"""All pairs of fields by the sum-square trick (Rendle 2010, lemma 3.1): what FM and DeepFM share.

B rows, F fields of ids, N floats, D embedding dimension
"""

import torch
from torch import nn


class Pairs(nn.Module):
    """Fields of ids, and a vector of its own for each float, which scales it."""

    def __init__(self, floats: int, dim: int, std: float) -> None:
        super().__init__()
        self.vectors_ND = nn.Parameter(torch.empty(floats, dim).normal_(std=std))

    def forward(self, fields_BFD: torch.Tensor, dense_BN: torch.Tensor) -> torch.Tensor:
        """[B, D] Σ_{i<j} (x_i v_i) ∘ (x_j v_j); its sum over D is Σ_{i<j} <v_i, v_j> x_i x_j."""
        # floats' vectors are never laid out [B, N, D]: their sum and sum of squares are matrix products
        total_BD = fields_BFD.sum(dim=1) + dense_BN @ self.vectors_ND
        squares_BD = fields_BFD.square().sum(dim=1) + dense_BN.square() @ self.vectors_ND.square()
        return (total_BD.square() - squares_BD) / 2
