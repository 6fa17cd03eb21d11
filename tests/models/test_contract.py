"""Every file of `models/` that defines a model keeps the same promises, on the same small schema."""

from typing import Any

import numpy as np
import pytest
import torch

from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError
from recsys_dist.models.layers import BatchNorm
from recsys_dist.models.protocol import model_module, model_names
from recsys_dist.schema import Schema
from recsys_dist.train.loop import Loss
from recsys_dist.train.sharding import materialise
from tests.batches import random_batch, small_catalogue, small_schema, take

pytestmark = pytest.mark.parametrize("name", model_names(counted=False))


def build(name: str, seed: int = 0, settings: dict[str, Any] | None = None) -> tuple[Any, Schema]:
    """The model on the small schema, with its default config but for `settings`, and the schema it reads."""
    module = model_module(name)
    cfg = module.Config.parse(settings or {})
    schema = module.Model.inputs(small_schema(), cfg)
    torch.manual_seed(seed)
    return materialise(module.Model(cfg, schema, small_catalogue()), seed), schema


def outputs(model: Any, batch: Batch) -> torch.Tensor:
    """Scores of a ranker, vectors of a recall model: what `forward` returns, without dropout."""
    model.eval()
    with torch.no_grad():
        return model(batch)


SLOW = {"lr": 300}  # steps: what nothing multiplies learns from small steps only
NOISY = {"fm"}  # models that fit all pairs of fields alike, those that mean nothing too
ADDITIVE = {"lr"}  # models that see no pair of features
TRUNKLESS = {"lr"}


def planted(schema: Schema, name: str, rows: int, seed: int) -> Batch:
    """Recall: a user's positive is the item of the user's own row, and the one watched before.

    All searched for the same word. Ranking: a click where the sum is odd.
    Where a model sees no pairs: a click where the user's row is odd.
    """
    rng = rng_for(seed, "planted")
    recall = model_module(name).Model.task == "recall"
    user = rng.integers(1, 30, rows)
    item = user if recall else rng.integers(1, 40, rows)
    click = (user if name in ADDITIVE else user + item) % 2
    columns = {"user": user, "item": item, "click": click, "searched": np.ones(rows, np.int64)}
    return random_batch(schema, rows, rng, columns | {"watched": user} if recall else columns)


def train(model: Any, batch: Batch, steps: int) -> list[float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    model.train()
    for step in range(steps):
        loss = model.loss(batch, step).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_model_states_what_it_is(name: str) -> None:
    model, schema = build(name)
    assert model.task in ("ranking", "recall")
    assert model_module(name).Config().name == name
    grouped = [p for group in model.table_groups().values() for p in group]
    tables = [p for n, p in model.named_parameters() if "embedding_bags." in n or ".embeddings." in n]
    assert {id(p) for p in grouped} == {id(p) for p in tables} and len(grouped) == len(tables)
    assert model_module(name).Model.inputs(schema, model_module(name).Config()) == schema


def test_loss_is_one_finite_value_per_row(name: str) -> None:
    model, schema = build(name)
    loss = model.loss(random_batch(schema, 9, rng_for(1, "rows")), 3)
    assert loss.shape == (9,) and bool(torch.isfinite(loss).all())
    again = model.loss(random_batch(schema, 9, rng_for(1, "rows")), 3)
    torch.testing.assert_close(loss, again)  # batch norm sums about a running mean: but for rounding


def test_rankers_learn_further_labels_on_their_trunk(name: str) -> None:
    module = model_module(name)
    if module.Model.task == "recall" or name in TRUNKLESS:
        pytest.skip("it has no trunk that tasks could share")
    model, schema = build(name, settings={"objective": {"tasks": {"like": 0.5}}})
    batch = random_batch(schema, 9, rng_for(1, "rows"))
    logit_BT = model.eval().logits(batch)
    like = torch.nn.functional.binary_cross_entropy_with_logits(
        logit_BT[:, 1], batch.labels["like"], reduction="none"
    )
    assert logit_BT.shape == (9, 2)
    alone = model.label_loss(logit_BT[:, 0], batch)
    torch.testing.assert_close(model.loss_of(logit_BT, batch), alone + 0.5 * like)
    model.loss_of(logit_BT, batch).sum().backward()
    assert all(weight.grad is not None for group in model.table_groups().values() for weight in group)


def test_planted_structure_is_recovered(name: str) -> None:
    """A ranker learns a parity of two ids, which no sum over single ids holds; recall learns a map."""
    model, schema = build(name)
    rows = 1500 if model.task == "ranking" else 800  # 1,131 pairs to learn, or 29
    losses = train(model, planted(schema, name, rows, seed=0), steps=SLOW.get(name, 100))
    assert losses[-1] < 0.5 * losses[0]
    held_out = planted(schema, name, 500, seed=1)
    scores = outputs(model, held_out)
    if model.task == "ranking":
        right = ((scores > 0).float() == held_out.labels["click"]).float().mean()
        assert right > (0.8 if name in NOISY else 0.9)
    else:
        best = (scores @ model.item_vectors().detach().T)[:, 1:].argmax(dim=1) + 1
        assert (best == held_out.sparse["item"].values()).float().mean() > 0.95


@pytest.mark.parametrize("looks_at_rows", [False, True])
def test_padding_is_inert(name: str, looks_at_rows: bool) -> None:
    module = model_module(name)
    settings = {"activation": "dice", "norm": "batch"} if looks_at_rows else {}
    settings = {key: value for key, value in settings.items() if key in module.Config.model_fields}
    if looks_at_rows and "activation" in settings and module.Model.task == "recall":
        with pytest.raises(ConfigError, match="activation"):
            build(name, settings=settings)
        return
    model, schema = build(name, settings=settings)
    batch = random_batch(schema, 6, rng_for(2, "pad"))
    gradients = []
    for grown in (batch, batch.pad(10)):
        model.train()
        loss = model.loss(grown, 0)
        assert bool(torch.isfinite(loss).all())
        model.zero_grad()
        (loss * grown.weight).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(outputs(model, grown)[:6], outputs(model, batch))
    close = {"rtol": 1e-4, "atol": 1e-4} if looks_at_rows else {}  # norms divide by what rounds otherwise
    torch.testing.assert_close(gradients[0], gradients[1], **close)


def test_outputs_do_not_see_other_rows(name: str) -> None:
    """A row scores as it does alone. (Its loss may depend on the others, as where these are negatives.)"""
    model, schema = build(name)
    batch = random_batch(schema, 12, rng_for(3, "rows"))
    for some in (torch.tensor([5]), torch.tensor([7, 0, 11])):
        torch.testing.assert_close(outputs(model, take(batch, some)), outputs(model, batch)[some])


def test_the_order_of_rows_changes_nothing(name: str) -> None:
    model, schema = build(name)
    batch = random_batch(schema, 12, rng_for(3, "rows"))
    order = torch.from_numpy(rng_for(3, "order").permutation(12))
    torch.testing.assert_close(outputs(model, take(batch, order)), outputs(model, batch)[order])
    torch.testing.assert_close(model.loss(take(batch, order), 1), model.loss(batch, 1)[order])


def test_a_worker_without_rows_computes_finite_zeros(name: str) -> None:
    """An unsharded TorchRec collection raises on a stride of 0, so such a worker pads to one row."""
    model, schema = build(name)
    empty = take(random_batch(schema, 4, rng_for(4, "rows")), torch.arange(0)).pad(1)
    assert bool(torch.isfinite(outputs(model, empty)).all())
    (model.loss(empty, 0) * empty.weight).sum().backward()
    assert all(not bool(p.grad.any()) for p in model.parameters() if p.grad is not None)


def test_state_dict_carries_the_scores(name: str) -> None:
    model, schema = build(name)
    batch = random_batch(schema, 50, rng_for(5, "rows"))
    train(model, batch, steps=3)
    other, _ = build(name, seed=99)
    assert not torch.equal(outputs(other, batch), outputs(model, batch))
    other.load_state_dict(model.state_dict())
    assert torch.equal(outputs(other, batch), outputs(model, batch))
    if model.task == "recall":
        assert torch.equal(other.item_vectors(), model.item_vectors())


def test_unknown_ids_and_empty_histories_score(name: str) -> None:
    model, schema = build(name)
    zeros = {f.name: np.zeros(3, np.int64) for f in schema.singles}
    batch = random_batch(schema, 3, rng_for(6, "rows"), zeros)
    assert bool(torch.isfinite(outputs(model, batch)).all())
    assert bool(torch.isfinite(model.loss(batch, 0)).all())


def watched(model: Any) -> list[torch.dtype]:
    """Filled with the types that a ranker's loss and all norms are given."""
    found: list[torch.dtype] = []

    def told(function: Any) -> Any:
        return lambda x, *more: (found.append(x.dtype), function(x, *more))[1]

    for norm in (module for module in model.modules() if isinstance(module, BatchNorm)):
        norm.moments = told(norm.moments)
    if model.task == "ranking":
        model.label_loss = told(model.label_loss)
    return found


def test_autocast_learns_the_same_in_fewer_bits(name: str) -> None:
    """The gradient points where that of 32 bits does; losses get logits, and norms inputs, of 32."""
    found = []
    for autocast in (False, True):
        module = model_module(name)
        normed = module.Model.task == "ranking" and "norm" in module.Config.model_fields
        model, schema = build(name, settings={"norm": "batch"} if normed else {})
        dtypes = watched(model)
        loss = Loss(model.train(), autocast)
        loss(random_batch(schema, 256, rng_for(4, "rows")), 0).mean().backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        assert set(dtypes) <= {torch.float32} and (dtypes or model.task == "recall")
    assert not torch.equal(*found)
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.99
    assert found[1].norm() == pytest.approx(float(found[0].norm()), rel=0.05)
