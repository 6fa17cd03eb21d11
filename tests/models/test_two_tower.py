"""Two-tower recall against its equations in NumPy: both towers, log Q, masks, mixed negatives, gradients."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError
from recsys_dist.feature_kinds import Statistic
from recsys_dist.models.losses import sampled_softmax
from recsys_dist.models.protocol import Catalogue
from recsys_dist.models.two_tower import Config, Model
from recsys_dist.schema import Schema
from recsys_dist.train.sharding import materialise
from tests.batches import random_batch, small_catalogue, small_schema

SMALL = {
    "embedding_dim": 8,
    "side_dim": 4,
    "hidden": [6],
    "item_hidden": [5],
    "output_dim": 4,
    "activation": "tanh",
}
WEIGHT = torch.tensor([0.3, 1, 1, 0.5, 0, 1, 1, 0.3])  # of a batch's rows, one of them padding


def build(catalogue: Catalogue | None = None, **settings: object) -> tuple[Model, Schema]:
    cfg = Config.parse({**SMALL, **settings})
    schema = Model.inputs(small_schema(), cfg)
    torch.manual_seed(0)
    return materialise(Model(cfg, schema, catalogue or small_catalogue()), 0).double(), schema


def batch_of(schema: Schema) -> Batch:
    """Eight rows in double precision: an item twice, one unknown, weights of all kinds."""
    columns = {"item": np.array([3, 9, 3, 0, 21, 7, 30, 11])}
    batch = random_batch(schema, 8, rng_for(1, "rows"), columns)
    return Batch(batch.dense.double(), batch.sparse, batch.labels, WEIGHT.double(), batch.row_id)


def numpy_items(model: Model, catalogue: Catalogue) -> np.ndarray:
    """[I, D] from the weights and the catalogue, feature by feature."""
    tables = {n: bag.weight.detach().numpy() for n, bag in model.item_tables.embedding_bags.items()}
    columns = {name: values.numpy() for name, values in catalogue.features.items()}
    x = np.concatenate(
        [tables["item_item"][columns["item"]], tables["item_author"][columns["author"]]], axis=1
    )
    x = np.concatenate([x, columns["duration"][:, None].astype(np.float64)], axis=1)
    w1, b1, w2, b2 = (p.detach().numpy() for p in model.item_tower.parameters())
    v = np.tanh(x @ w1.T + b1) @ w2.T + b2
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def test_items_are_a_tower_over_the_catalogues_features() -> None:
    model, _ = build()
    np.testing.assert_allclose(
        model.item_vectors().detach().numpy(), numpy_items(model, small_catalogue()), rtol=1e-9
    )
    other = small_catalogue().features | {"duration": torch.zeros(40)}
    moved = build(Catalogue(torch.arange(40), other))[0].item_vectors()
    assert not torch.allclose(moved, model.item_vectors())


def test_users_are_a_tower_over_means_floats_and_lengths() -> None:
    model, schema = build(features=["watched", "hour", "age"])
    batch = batch_of(schema)
    tables = {n: bag.weight.detach().numpy() for n, bag in model.tables.embedding_bags.items()}
    rows = []
    for b in range(8):
        watched, hour = (batch.sparse[n].to_dense()[b].numpy() for n in ("watched", "hour"))
        mean = tables["item"][watched].mean(axis=0) if len(watched) else np.zeros(8)
        age = batch.dense[b, 0].item()  # of the item's duration the tower sees nothing
        rows.append([*tables["hour"][hour[0]], *mean, age, np.log1p(len(watched)) / 4])
    w1, b1, w2, b2 = (p.detach().numpy() for p in model.tower.parameters())
    u = np.tanh(np.array(rows) @ w1.T + b1) @ w2.T + b2
    expected = u / np.linalg.norm(u, axis=1, keepdims=True)
    np.testing.assert_allclose(model(batch).detach().numpy(), expected, rtol=1e-6)


@dataclass(frozen=True)
class Equations:
    """The module's equations, by a loop over rows and candidates."""

    positive: np.ndarray
    drawn: np.ndarray
    share: np.ndarray
    drawing: np.ndarray
    temperature: float
    history: list[set[int]]

    def __call__(self, user: np.ndarray, item: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Loss [B], and the gradient of its weighted sum in the users [B, D] and in the items [I, D]."""
        weight = WEIGHT.double().numpy() * (self.positive > 0)
        expected = weight.sum() * self.share + len(self.drawn) * self.drawing
        losses, user_slope, item_slope = np.zeros(len(user)), np.zeros_like(user), np.zeros_like(item)
        for b in np.flatnonzero(self.positive):
            own = self.positive[b]
            term = np.exp(item @ user[b] / self.temperature - np.log(np.maximum(expected, 1e-300)))
            out = {own, 0, *self.history[b]}
            others = [(i, weight[j]) for j, i in enumerate(self.positive)] + [(i, 1.0) for i in self.drawn]
            candidates = [(own, 1.0), *((i, mass) for i, mass in others if i not in out)]
            total = sum(mass * term[i] for i, mass in candidates)
            losses[b] = -np.log(term[own] / total)
            scale = WEIGHT[b].item() / self.temperature
            for i, mass in [*candidates, (own, -total / term[own])]:  # Σ_j P_j - 1 of the positive
                user_slope[b] += scale * mass * term[i] / total * item[i]
                item_slope[i] += scale * mass * term[i] / total * user[b]
        return losses, user_slope, item_slope


@pytest.mark.parametrize(
    "settings",
    [
        {"negatives": 0},
        {"negatives": 30},
        {"negatives": 30, "negatives_alpha": 0.5, "temperature": 0.5, "mask_history": True},
    ],
    ids=["in-batch", "mixed", "mixed by popularity, history masked"],
)
def test_loss_and_its_gradient_are_the_equations(settings: dict) -> None:
    weight = torch.from_numpy(rng_for(2, "weight").uniform(0.5, 9, 40)).float()
    catalogue = Catalogue(torch.arange(40), small_catalogue().features, weight)
    model, schema = build(catalogue, **settings)
    batch = batch_of(schema)
    share = np.r_[0, weight[1:].double() / weight[1:].double().sum()]
    drawing = np.r_[0, np.arange(2, 41) ** model.cfg.negatives_alpha]
    lists = [set(ids.tolist()) for ids in batch.sparse["watched"].to_dense()]
    equations = Equations(
        batch.sparse["item"].values().numpy(),
        model.negatives.draw(3).numpy(),
        share,
        drawing / drawing.sum(),
        model.cfg.temperature,
        lists if model.cfg.mask_history else [set()] * 8,
    )
    users, items, loss = model(batch), model.item_vectors(), model.loss(batch, 3)
    expected, user_slope, item_slope = equations(users.detach().numpy(), items.detach().numpy())
    np.testing.assert_allclose(loss.detach().numpy(), expected, rtol=1e-6)
    weights = list(model.parameters())
    chained = (users * torch.from_numpy(user_slope)).sum() + (items * torch.from_numpy(item_slope)).sum()
    found = torch.autograd.grad((loss * batch.weight).sum(), weights)
    for mine, theirs in zip(found, torch.autograd.grad(chained, weights), strict=True):
        np.testing.assert_allclose(mine.numpy(), theirs.numpy(), rtol=1e-5, atol=1e-7)
        assert mine.abs().max() > 1e-3


def test_shares_follow_the_weight_of_training_and_are_positive() -> None:
    weight = torch.tensor([5.0, 0.0, 3.0])
    model, _ = build(Catalogue(torch.arange(3), {}, weight))
    assert model.share_I.tolist() == [0, 0.25, 0.75]
    assert build()[0].share_I[1:4].tolist() == pytest.approx([1 / 780, 2 / 780, 3 / 780])


def test_correction_finds_the_full_softmax_ranking_under_zipf() -> None:
    """P(item | user) is known: what in-batch softmax learns ranks by it with log q, by P / q without."""
    rng = rng_for(5, "zipf")
    users, items, rows, steps = 6, 30, 128, 300
    p = np.exp(rng.normal(size=(users, items)) - np.log(np.arange(1, items + 1)))
    p /= p.sum(axis=1, keepdims=True)
    user = rng.integers(0, users, (steps, rows))
    item = torch.from_numpy((rng.random((steps, rows, 1)) < p.cumsum(axis=1)[user]).argmax(axis=2))
    log_q = torch.from_numpy(np.log(p.mean(axis=0)))
    one_hot = torch.eye(items, dtype=torch.float64)
    agreement = []
    for correction in (log_q, torch.zeros_like(log_q)):
        score = torch.zeros(users, items, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([score], lr=0.05)
        for step in range(steps):
            of = item[step]
            same = of[:, None] == of[None, :]
            logit, chosen = score[user[step]], one_hot[of]
            loss = sampled_softmax(logit, chosen, chosen, correction[of], correction[of], same)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
        ranks = [s.argsort().argsort() for s in (score.detach().numpy(), p)]
        agreement.append(np.mean([np.corrcoef(*of_user)[0, 1] for of_user in zip(*ranks, strict=True)]))
    assert agreement[0] > 0.85 and agreement[0] > agreement[1] + 0.2, agreement


def test_an_unknown_positive_teaches_nothing_and_is_no_negative() -> None:
    model, schema = build(negatives=0)
    batch = random_batch(schema, 3, rng_for(3, "rows"), {"item": np.array([0, 4, 9])})
    batch = Batch(batch.dense.double(), batch.sparse, batch.labels, batch.weight.double(), batch.row_id)
    loss = model.loss(batch, 0)
    two = random_batch(schema, 3, rng_for(3, "rows"), {"item": np.array([9, 4, 9])})
    weight = torch.tensor([0.0, 1, 1]).double()
    without = model.loss(Batch(batch.dense, two.sparse, batch.labels, weight, batch.row_id), 0)
    assert loss[0] == 0 and loss[1] > 0
    torch.testing.assert_close(loss[1:], without[1:])


def test_what_it_reads_and_what_it_refuses() -> None:
    schema = small_schema()
    names = [f.name for f in Model.inputs(schema, Config()).features]
    assert names == ["user", "item", "author", "watched", "watched_authors", "searched", "age", "duration"]
    by_author = build(item_features=["author"])[0]
    assert by_author.item_names == ["author"] and by_author.item_vectors().shape == (40, 4)
    rate = Statistic(name="item_rate", key="item_id", label="click")
    rated = Schema.parse({**schema.model_dump(), "features": [*schema.model_dump()["features"], rate]})
    assert [f.name for f in Model.inputs(rated, Config()).features] == names
    for config, message in (
        ({"features": ("watched", "author")}, "'author' belongs to the item"),
        ({"features": ("age",)}, "user tower has no id feature"),
        ({"item_features": ("duration",)}, "item tower has no id feature"),
        ({"item_features": ("item", "age")}, "'age' is not the item's alone"),
        ({"item_features": ("item", "item_rate")}, "'item_rate' changes from day to day"),
        ({"item_features": ("authr",)}, "did you mean 'author'"),
        ({"features": ("user",), "mask_history": True}, "mask_history needs a sequence of item ids"),
    ):
        with pytest.raises(ConfigError, match=message):
            Model.inputs(rated, Config.parse(config))
