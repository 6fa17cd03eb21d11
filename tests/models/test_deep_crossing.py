"""Deep Crossing's residual unit against equation 4."""

import numpy as np
import torch

from recsys_dist.models.deep_crossing import Config, ResidualUnit
from tests.models.formula import Arrays, agrees, linear


def test_a_residual_unit_is_equation_4() -> None:
    torch.manual_seed(0)
    unit = ResidualUnit(5, 3, Config()).double()

    def equation(a: Arrays) -> np.ndarray:
        inner = np.maximum(linear(a, "inner.layers.0", a["x_BI"]), 0)
        return np.maximum(a["x_BI"] + linear(a, "inner.layers.2", inner), 0)

    x = torch.randn(4, 5, dtype=torch.double)
    agrees(_Rows(unit), {"x_BI": x}, lambda a: equation({k.removeprefix("unit."): v for k, v in a.items()}))


class _Rows(torch.nn.Module):
    """The unit on rows that are all real."""

    def __init__(self, unit: ResidualUnit) -> None:
        super().__init__()
        self.unit = unit

    def forward(self, x_BI: torch.Tensor) -> torch.Tensor:
        return self.unit(x_BI, torch.ones(len(x_BI), dtype=torch.bool))
