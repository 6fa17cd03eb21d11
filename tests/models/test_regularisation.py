"""DIN's mini-batch aware regularisation against its equation 6."""

import dataclasses

import numpy as np
import pytest
import torch

from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError
from recsys_dist.models import din, dsin
from recsys_dist.models.protocol import model_module
from recsys_dist.models.regularisation import BatchAwareL2, pulled
from recsys_dist.train.loop import Epoch, Loss, Workers, idle_batch
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.sharding import materialise
from tests.batches import ROWS, random_batch, small_catalogue, small_schema
from tests.train.unsharded import train_unsharded

RATE, LAMBDA, REAL = 0.5, 0.3, 9
SGD = OptimizerConfig.parse({"deep": {"rule": "sgd", "lr": RATE}})
EVERY = small_schema()
SCHEMA = EVERY.select(f.name for f in EVERY.features if f.name != "searched")  # known by its mean alone
TABLES = ("user", "item", "author", "hour")


def tables(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {n.split(".")[-2]: w.numpy().copy() for n, w in model.state_dict().items() if "_bags." in n}


def updated(name: str, regularisation: float, batch: Batch) -> tuple[dict[str, np.ndarray], ...]:
    """All tables before and after one step."""
    module = model_module(name)
    cfg = module.Config(regularisation=regularisation, embedding_std=1.0)
    schema = module.Model.inputs(SCHEMA, cfg)
    torch.manual_seed(0)
    loss = materialise(Loss(module.Model(cfg, schema, small_catalogue())), 0)
    before = tables(loss)
    optimizers = train_unsharded(loss, loss.model.table_groups(), SGD)
    Epoch(loss, optimizers, idle_batch(schema, REAL + 3), Workers()).run(iter([batch]), 0)
    return before, tables(loss)


def weighted() -> Batch:
    """Ids come in many rows, and more than once in one."""
    batch = random_batch(SCHEMA, REAL, rng_for(0, "rows"), {"user": np.arange(REAL) % 4})
    return dataclasses.replace(batch, weight=torch.linspace(0.5, 2, REAL))


def alpha_over_n(batch: Batch, table: str) -> np.ndarray:
    schema = SCHEMA
    found = [batch.sparse[f.name].values().numpy() for f in schema.ids if schema.table(f) == table]
    alpha = np.isin(np.arange(ROWS[table]), np.concatenate(found))
    assert alpha.any() and not alpha.all()
    return alpha / (1 + np.arange(ROWS[table]) % 7)


@pytest.mark.parametrize("name", ["din", "dien", "dsin"])
def test_one_update_is_that_of_equation_6(name: str) -> None:
    """Rows weigh differently and three are padding; DIEN's negatives are no part of the batch."""
    batch = weighted()
    before, plain = updated(name, 0.0, batch)
    same, found = updated(name, LAMBDA, batch)
    assert sorted(before) == sorted(TABLES)
    for table in TABLES:
        np.testing.assert_array_equal(before[table], same[table])
        expected = plain[table] - RATE * LAMBDA * alpha_over_n(batch, table)[:, None] * before[table]
        np.testing.assert_allclose(found[table], expected, atol=2e-6, err_msg=table)


def test_the_gradient_in_double_precision() -> None:
    """TorchRec's bags give floats, so here a table of plain doubles is looked up instead."""
    schema, batch = SCHEMA, weighted()
    features = [schema["item"], schema["watched"]]
    l2 = BatchAwareL2(LAMBDA, schema, features, small_catalogue().occurrences).double()
    table = torch.randn(ROWS["item"], 4, dtype=torch.float64, requires_grad=True)
    weight = {f.name: torch.randn(len(batch.sparse[f.name].values()), 4).double() for f in features}
    for name, rate in l2(batch).items():
        (pulled(table[batch.sparse[name].values()], rate) * weight[name]).sum().backward()
    expected = LAMBDA * alpha_over_n(batch, "item")[:, None] * table.detach().numpy()
    for name, of_loss in weight.items():
        np.add.at(expected, batch.sparse[name].values().numpy(), of_loss.numpy())
    assert table.grad is not None
    np.testing.assert_allclose(table.grad, expected, rtol=1e-12)


def test_rows_of_weight_zero_pull_nothing() -> None:
    schema = SCHEMA
    model = materialise(din.Model(din.Config(regularisation=1.0), schema, small_catalogue()), 0)
    rates = model.behaviours.l2(idle_batch(schema, 4))  # looks up row 0 of every table
    assert all(not bool(rate.any()) for rate in rates.values())


def test_what_is_known_by_its_mean_is_refused() -> None:
    cfg = din.Config(regularisation=0.1, histories=("watched",))
    with pytest.raises(ConfigError, match=r"din: regularisation=0.1 .* 'watched_authors' .*attend to it"):
        din.Model(cfg, SCHEMA, small_catalogue())
    cfg = din.Config(regularisation=0.1)
    with pytest.raises(ConfigError, match=r"of searches 'searched' only their mean .*leave it out"):
        din.Model(cfg, EVERY, small_catalogue())
    dsin.Model(dsin.Config(regularisation=0.1), SCHEMA, small_catalogue())
