"""The sum-square trick against all pairs, one by one; FM and DeepFM against their equations."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from recsys_dist.config import rng_for
from recsys_dist.models import deepfm, fm
from recsys_dist.models.pairs import Pairs
from recsys_dist.train.sharding import materialise
from tests.batches import random_batch, small_schema
from tests.models.formula import Arrays, agrees


def all_pairs(fields: np.ndarray, dense: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    every = [*fields, *(x * v for x, v in zip(dense, vectors, strict=True))]
    return sum((a * b for i, a in enumerate(every) for b in every[i + 1 :]), start=np.zeros(fields.shape[1]))


def test_the_trick_is_the_sum_over_all_pairs() -> None:
    torch.manual_seed(0)
    pairs = Pairs(floats=2, dim=4, std=1.0).double()

    def equation(a: Arrays) -> np.ndarray:
        rows = zip(a["fields_BFD"], a["dense_BN"], strict=True)
        return np.stack([all_pairs(fields, dense, a["vectors_ND"]) for fields, dense in rows])

    fields, dense = torch.randn(5, 3, 4, dtype=torch.double), torch.randn(5, 2, dtype=torch.double)
    agrees(pairs, {"fields_BFD": fields, "dense_BN": dense}, equation)


@pytest.mark.parametrize("module", [fm, deepfm])
def test_the_logit_adds_linear_part_pairs_and_tower(module) -> None:
    torch.manual_seed(0)
    model = materialise(module.Model(module.Config(), small_schema()), 0).eval()
    for parameter in model.parameters():  # the linear part starts at zero; give the test something to see
        torch.nn.init.normal_(parameter, std=0.3)
    model = model.double()
    batch = random_batch(small_schema(), 4, rng_for(0, "rows"))
    dense = batch.dense.double()
    fields, linear = model.fields(batch.sparse)
    expected = linear + model.dense(dense)[:, 0]
    of_pairs = [
        all_pairs(*rows, model.pairs.vectors_ND.detach().numpy())
        for rows in zip(fields.detach().numpy(), dense.numpy(), strict=True)
    ]
    expected = expected + torch.tensor(np.stack(of_pairs)).sum(dim=1)
    if module is deepfm:
        expected = expected + model.tower(torch.cat([fields.flatten(1), dense], dim=1))[:, 0]
    torch.testing.assert_close(model(replace(batch, dense=dense)), expected, rtol=1e-6, atol=1e-6)
