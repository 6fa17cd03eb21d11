"""Factorisation machine against equation 1 of the paper by a loop over pairs, and its gradient."""

import numpy as np
import torch

from recsys_dist.config import rng_for
from recsys_dist.models.fm import Config, Model
from recsys_dist.train.sharding import materialise
from tests.batches import random_batch, small_schema

DIM = 8


def test_logit_and_gradient_are_equation_1() -> None:
    """Half the square of the sum less the sum of squares is the sum over pairs <v_i, v_j> x_i x_j.

    x has F embedded fields of value 1 (a sequence's vector is its items' mean) and then the floats.
    dz/dv_i = x_i (Σ_j v_j x_j - v_i x_i), dz/dw_i = x_i, dz/db = 1.
    """
    torch.manual_seed(0)
    cfg = Config(embedding_dim=DIM, embedding_std=1)
    model = materialise(Model(cfg, Model.inputs(small_schema(), cfg)), 0)
    for name, parameter in model.named_parameters():
        if "wide" in name or "dense" in name:  # start at zero, or near; give the test something to see
            torch.nn.init.normal_(parameter)
    batch = random_batch(small_schema(), 6, rng_for(0, "fm"))
    fields_BFD, linear_B = (found.detach() for found in model.fields(batch.sparse))
    fields = fields_BFD.double().requires_grad_()
    model.double()
    dense = batch.dense.double()
    pairs = model.pairs(fields, dense).sum(dim=1)
    pairs.sum().backward()
    logit = pairs + linear_B + model.dense(dense)[:, 0]
    np.testing.assert_allclose(model.float()(batch).detach(), logit.detach(), rtol=1e-4, atol=1e-4)

    floats = model.pairs.vectors_ND.detach().numpy().astype(np.float64)
    weight, bias = model.dense.layers[0].weight.detach().numpy()[0], model.dense.layers[0].bias.item()
    of_floats = np.zeros_like(floats)
    for row in range(batch.rows):
        vectors = np.concatenate([fields.detach().numpy()[row], floats])
        x = np.concatenate([np.ones(fields.shape[1]), dense[row].numpy()])
        pairs_of_row = sum(
            vectors[i] @ vectors[j] * x[i] * x[j] for i in range(len(x)) for j in range(i + 1, len(x))
        )
        np.testing.assert_allclose(pairs[row].item(), pairs_of_row, rtol=1e-7)
        linear = linear_B[row].item() + dense[row].numpy() @ weight + bias
        np.testing.assert_allclose(logit[row].item(), linear + pairs_of_row, rtol=1e-6)
        gradient = x[:, None] * ((vectors * x[:, None]).sum(axis=0) - vectors * x[:, None])
        np.testing.assert_allclose(fields.grad[row].numpy(), gradient[: fields.shape[1]], rtol=1e-7)
        of_floats += gradient[fields.shape[1] :]
    np.testing.assert_allclose(model.pairs.vectors_ND.grad, of_floats, rtol=1e-6)
