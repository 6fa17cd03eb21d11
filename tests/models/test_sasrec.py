"""SASRec against its equations in NumPy, a sequence at a time; what it reads; sequences of any length."""

from typing import Any

import numpy as np
import pytest
import torch
from torchrec import JaggedTensor

from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError
from recsys_dist.models.protocol import Catalogue
from recsys_dist.models.sasrec import Config, Model
from recsys_dist.schema import Schema
from recsys_dist.train.sharding import materialise
from tests.batches import random_batch, small_schema, take

LONGEST = 5  # of `watched` in the small schema


def build(cfg: Config, longest: int = LONGEST) -> tuple[Model, Schema]:
    torch.manual_seed(0)
    values = Model.inputs(small_schema(), cfg).model_dump()
    features = [f | ({"max_length": longest} if f["kind"] == "sequence" else {}) for f in values["features"]]
    schema = Schema.parse({**values, "features": features})
    model = materialise(Model(cfg, schema, Catalogue(torch.arange(40))), 0).double().eval()
    for parameter in model.parameters():  # away from zero biases and unit norms, which hide mistakes
        parameter.data += 0.1 * torch.randn_like(parameter)
        parameter.data = parameter.data.float().double()
    model.tables.register_forward_hook(in_double)
    return model, schema


def in_double(_module: Any, _inputs: Any, found: dict[str, JaggedTensor]) -> dict[str, JaggedTensor]:
    """TorchRec gives float32 whatever its tables have."""
    return {key: JaggedTensor(v.values().double(), lengths=v.lengths()) for key, v in found.items()}


def norm(x: np.ndarray, layer: torch.nn.LayerNorm) -> np.ndarray:
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * weight + bias


def linear(x: np.ndarray, layer: torch.nn.Linear) -> np.ndarray:
    return x @ layer.weight.detach().numpy().T + layer.bias.detach().numpy()


def attention(x: np.ndarray, block: torch.nn.Module) -> np.ndarray:
    """One place at a time, a head at a time."""
    q, k, v = np.split(linear(x, block.qkv.layers[0]), 3, axis=1)
    size = x.shape[1] // block.heads
    found = np.zeros_like(x)
    for at in range(len(x)):
        for head in range(block.heads):
            of = slice(head * size, (head + 1) * size)
            weight = np.exp(k[: at + 1, of] @ q[at, of] / np.sqrt(size))
            found[at, of] = weight / weight.sum() @ v[: at + 1, of]
    return linear(found, block.joined.layers[0])


def pointwise(x: np.ndarray, block: torch.nn.Module) -> np.ndarray:
    return linear(np.maximum(linear(x, block.pointwise.layers[0]), 0), block.pointwise.layers[2])


def predictions(model: Model, items: list[int]) -> np.ndarray:
    """[n, D] what each place of one sequence predicts."""
    table, places = model.tables.embeddings["item"].weight.detach().numpy(), model.places.detach().numpy()
    items = items[-model.longest :] or [0]
    x = np.array([table[item] + places[len(items) - 1 - at] for at, item in enumerate(items)])
    for block in model.blocks:
        if model.cfg.norm == "pre":
            x = x + attention(norm(x, block.norms[0]), block)
            x = x + pointwise(norm(x, block.norms[1]), block)
        else:
            x = norm(x + attention(x, block), block.norms[0])
            x = norm(x + pointwise(x, block), block.norms[1])
    return norm(x, model.norm) if model.cfg.norm == "pre" else x


def histories(batch: Batch) -> list[list[int]]:
    return [ids.tolist() for ids in batch.sparse["watched"].to_dense()]


@pytest.mark.parametrize(
    "cfg", [Config(dim=8, heads=2, tied=False), Config(dim=12, heads=3, blocks=1, norm="post")]
)
def test_users_are_what_their_newest_items_predict(cfg: Config) -> None:
    model, schema = build(cfg)
    batch = random_batch(schema, 40, rng_for(0, "rows"))
    assert {len(h) for h in histories(batch)} == set(range(LONGEST + 1))
    expected = [predictions(model, items)[-1] for items in histories(batch)]
    np.testing.assert_allclose(model(batch).detach().numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("loss", ["softmax", "sampled_softmax", "gbce"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_position_learns_the_item_after_it(loss: str, tied: bool) -> None:
    cfg = Config(dim=8, loss=loss, tied=tied, negatives=9, negatives_alpha=0.5, calibration=0.6)  # type: ignore[arg-type]
    model, schema = build(cfg)
    columns = {"item": np.array([7, 0, 3, 30, 12, 25])}
    batch = random_batch(schema, 6, rng_for(1, "rows"), columns)
    items = model.item_vectors().detach().numpy()
    q = np.r_[1, np.arange(1, 40) + 1.0] ** 0.5
    log_q = np.log(q / q[1:].sum())
    beta = 9 / 39 * (0.6 * (1 - 39 / 9) + 39 / 9)
    expected = []
    for past, target in zip(histories(batch), columns["item"], strict=True):
        total = 0.0
        for vector, wanted in zip(predictions(model, past), [*past[1:], target], strict=True):
            score, drawn = items @ vector, model.negatives.draw(2).numpy()
            drawn = drawn[drawn != wanted]
            if wanted == 0:
                continue
            if loss == "softmax":
                total += np.log(np.exp(score[1:]).sum()) - score[wanted]
            elif loss == "sampled_softmax":
                exp = np.exp(score - log_q)
                total -= np.log(exp[wanted] / (exp[wanted] + exp[drawn].sum()))
            else:
                p = 1 / (1 + np.exp(-score))
                total -= (beta * np.log(p[wanted]) + np.log(1 - p[drawn]).sum()) / 10
        expected.append(total / LONGEST)
    np.testing.assert_allclose(model.loss(batch, 2).detach().numpy(), expected, rtol=1e-5)


def test_gradients_are_the_slopes_of_the_equations() -> None:
    """Along a random direction of all weights together, by central differences in NumPy."""
    model, schema = build(Config(dim=8, heads=2))
    batch = random_batch(schema, 8, rng_for(2, "rows"))
    torch.manual_seed(1)
    out = torch.randn(8, 8, dtype=torch.float64)
    (model(batch) * out).sum().backward()
    directions = [torch.randn_like(p) for p in model.parameters()]
    slope = sum(float((p.grad * d).sum()) for p, d in zip(model.parameters(), directions, strict=True))
    values = []
    for step in (1e-5, -2e-5):
        for parameter, direction in zip(model.parameters(), directions, strict=True):
            parameter.data += step * direction
        found = [predictions(model, items)[-1] for items in histories(batch)]
        values.append((np.array(found) * out.numpy()).sum())
    assert slope == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-6)


def test_no_position_sees_what_comes_after_it() -> None:
    """The loss of a history's own positions does not depend on the row's item, but for the last one."""
    model, schema = build(Config(dim=8, loss="softmax"))
    batch = random_batch(schema, 20, rng_for(3, "rows"), {"item": np.arange(1, 21)})
    losses = model.loss(batch, 0).detach().numpy() * LONGEST
    score = (model(batch) @ model.item_vectors().T)[:, 1:]
    last = torch.nn.functional.cross_entropy(score, torch.arange(20), reduction="none").detach().numpy()
    batch = random_batch(schema, 20, rng_for(3, "rows"), {"item": np.zeros(20)})  # unknown: no loss
    np.testing.assert_allclose(losses - last, model.loss(batch, 0).detach().numpy() * LONGEST, atol=1e-9)
    assert (losses - last > 1).any()


def test_sequences_of_any_length_give_the_newest_of_them() -> None:
    model, _ = build(Config(dim=8), longest=3)
    rows = random_batch(small_schema(), 40, rng_for(4, "rows"))
    long = [row for row, items in enumerate(histories(rows)) if len(items) == LONGEST]
    assert long
    full = take(rows, torch.tensor(long))
    items = histories(full)
    np.testing.assert_allclose(
        model(full).detach().numpy(), [predictions(model, past[-3:])[-1] for past in items], rtol=1e-6
    )
    assert bool(torch.isfinite(model.loss(full, 0)).all())


def test_reads_one_sequence_of_item_ids() -> None:
    schema = small_schema()
    assert [f.name for f in Model.inputs(schema, Config()).features] == ["item", "watched"]
    with pytest.raises(ConfigError, match="'watched_authors' is no sequence of item ids; those are watched"):
        Model.inputs(schema, Config(sequence="watched_authors"))
    with pytest.raises(ConfigError, match="needs a sequence of item ids"):
        Model.inputs(schema.select(["item", "user"]), Config())
    with pytest.raises(ConfigError, match="dim=64 cannot be shared evenly by heads=3"):
        Config.parse({"heads": 3})
