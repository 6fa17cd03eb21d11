"""YoutubeDNN recall against its equations in NumPy; what it reads; how it draws negatives."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchrec import JaggedTensor, KeyedJaggedTensor

from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError
from recsys_dist.models.protocol import Catalogue
from recsys_dist.models.youtubednn import Config, Model
from recsys_dist.train.sharding import materialise
from tests.batches import random_batch, small_schema
from tests.models.test_contract import train

POSITIVES = torch.arange(40)


def build(cfg: Config) -> tuple[Model, list[str]]:
    torch.manual_seed(0)
    schema = Model.inputs(small_schema(), cfg)
    model = materialise(Model(cfg, schema, Catalogue(POSITIVES)), 0).eval()
    return model, [feature.name for feature in schema.features]


def test_reads_users_and_named_context_never_the_target() -> None:
    _, read = build(Config())
    assert read == ["user", "item", "author", "watched", "watched_authors", "searched", "age"]
    cfg = Config(features=("user", "hour", "watched", "watched_authors", "age"))
    model, read = build(cfg)
    assert read == ["user", "item", "author", "hour", "watched", "watched_authors", "age"]
    schema = Model.inputs(small_schema(), cfg)
    fixed = {"user": np.arange(1, 9), "hour": np.arange(1, 9), "age": np.arange(8.0)}
    scores = []
    for target in (1, 5):  # another target item and author, the same user
        columns = {**fixed, "item": np.full(8, target), "author": np.full(8, target)}
        scores.append(model(random_batch(schema, 8, rng_for(0, "rows"), columns)))
    assert torch.equal(*scores)


MEAN = Config(shared=True, hidden=None, features=("watched",), normalise=False, temperature=1)


@pytest.mark.parametrize(
    "cfg",
    [
        Config(),
        Config(item_bias=True),
        Config(normalise=False, temperature=1, item_bias=True),
        Config(shared=True),
        Config(shared=True, item_bias=True),
        MEAN,
    ],
)
def test_loss_is_the_sampled_softmax_of_vectors_and_counts(cfg: Config) -> None:
    model, _ = build(cfg)
    batch = random_batch(Model.inputs(small_schema(), cfg), 7, rng_for(1, "rows"))
    users, items = model(batch).detach().double().numpy(), model.item_vectors().detach().double().numpy()
    assert users.shape[1] == items.shape[1] == 64 + 4 * cfg.item_bias and items.shape[0] == 40
    q = np.r_[0, (np.arange(1, 40) + 1) ** 0.75]
    logit = users @ items.T / cfg.temperature - np.log(np.maximum(q / q.sum(), 1e-300))
    drawn = model.negatives.draw(3).numpy()
    for row, positive in enumerate(batch.sparse["item"].values().tolist()):
        others = np.exp(logit[row, drawn[drawn != positive]]).sum()
        expected = np.log(1 + others / np.exp(logit[row, positive]))
        assert model.loss(batch, 3)[row].item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("normalise", [False, True])
def test_bias_adds_the_mean_of_an_item_vectors_last_entries(normalise: bool) -> None:
    model, _ = build(Config(normalise=normalise, item_bias=True, temperature=0.25))
    users = model(random_batch(Model.inputs(small_schema(), Config()), 5, rng_for(2, "rows")))
    assert users[:, 64:].tolist() == [[0.125] * 4] * 5
    items = model.item_vectors()
    assert items[:, 64:].std() > 0.01
    for vectors in (users, items):
        lengths = vectors[:, :64].norm(dim=1)
        assert torch.allclose(lengths, torch.ones_like(lengths)) == normalise


def test_with_one_table_and_no_tower_a_user_is_the_mean_of_her_items() -> None:
    model, _ = build(MEAN)
    items = model.item_vectors()
    batch = random_batch(Model.inputs(small_schema(), MEAN), 9, rng_for(6, "rows"))
    for user, watched in zip(model(batch), batch.sparse["watched"].to_dense(), strict=True):
        expected = items[watched.long()].mean(dim=0) if len(watched) else torch.zeros(64)
        assert torch.allclose(user, expected, atol=1e-6)
    assert [len(weights) for weights in model.table_groups().values()] == [1]


@pytest.mark.parametrize("shared", [False, True])
def test_without_a_tower_a_user_is_the_sum_of_her_embeddings(shared: bool) -> None:
    features = ("watched", "user")
    cfg = Config(hidden=None, side_dim=64, features=features, item_bias=True, shared=shared)
    model, _ = build(cfg)
    batch = random_batch(Model.inputs(small_schema(), cfg), 9, rng_for(6, "rows"))
    tables = {name: bag.weight for name, bag in model.tables.embedding_bags.items()}
    watched, user = (tables[small_schema().table(small_schema()[name])] for name in ("watched", "user"))
    lists = batch.sparse["watched"].to_dense()
    for row, (of, items) in enumerate(zip(batch.sparse["user"].values(), lists, strict=True)):
        mean = watched[items.long(), :64].mean(dim=0) if len(items) else torch.zeros(64)
        expected = torch.nn.functional.normalize(mean + user[of], dim=0)
        assert torch.allclose(model(batch)[row, :64], expected, atol=1e-6)


def test_words_tell_what_is_searched_for() -> None:
    """Each item is called by a pair of words, and nothing else tells which one a user wants."""
    model, _ = build(Config(negatives=64, embedding_std=0.3))
    schema = Model.inputs(small_schema(), Config())

    def searching(rows: int, seed: int) -> Batch:
        rng = rng_for(seed, "searches")
        first, second = rng.integers(1, 6, (2, rows))
        batch = random_batch(schema, rows, rng, {"item": 1 + 5 * (first - 1) + second, "searched": first})
        words = np.stack([first, 5 + second], axis=1)
        ids = batch.sparse.to_dict() | {"searched": jagged(words)}
        return replace(batch, sparse=KeyedJaggedTensor.from_jt_dict(ids))

    train(model, searching(1_000, 0), steps=150)
    held_out = searching(300, 1)
    with torch.no_grad():
        best = (model(held_out) @ model.item_vectors().T)[:, 1:].argmax(dim=1) + 1
    assert (best == held_out.sparse["item"].values()).float().mean() > 0.9


def jagged(ids: np.ndarray) -> JaggedTensor:
    lengths = torch.full((len(ids),), ids.shape[1], dtype=torch.int32)
    return JaggedTensor(torch.from_numpy(ids.flatten()).int(), lengths=lengths)


def test_an_unknown_positive_teaches_nothing() -> None:
    model, _ = build(Config())
    columns = {"item": np.array([0, 4])}
    loss = model.loss(random_batch(Model.inputs(small_schema(), Config()), 2, rng_for(3, "rows"), columns), 0)
    assert loss[0] == 0 and loss[1] > 0


def test_the_last_layer_may_be_activated_as_in_the_paper() -> None:
    model, _ = build(Config(normalise=False, output_activation=True))
    users = model(random_batch(Model.inputs(small_schema(), Config()), 50, rng_for(4, "rows")))
    assert users.shape == (50, 64) and users.min() == 0


def test_what_it_cannot_do_is_refused() -> None:
    schema = small_schema()
    with pytest.raises(ConfigError, match="'author' belongs to the item"):
        Model.inputs(schema, Config(features=("watched", "author")))
    with pytest.raises(ConfigError, match="needs a sequence feature"):
        Model.inputs(schema, Config(features=("user",)))
    with pytest.raises(ConfigError, match="did you mean 'watched'"):
        Model.inputs(schema, Config(features=("watchd",)))
    with pytest.raises(ConfigError, match=r"adds embeddings of 64 dimensions, and .*user.* has none such"):
        Model.inputs(schema, Config(hidden=None, features=("watched", "user")))
    with pytest.raises(ConfigError, match="sequence of item ids"):
        Model.inputs(schema, Config(shared=True, features=("watched_authors",)))
    with pytest.raises(ConfigError, match="one value"):
        Config.parse({"shared": True, "output_dim": 32})


@pytest.mark.parametrize("loss", ["bpr", "gbce"])
def test_other_losses_see_the_same_logits(loss: str) -> None:
    cfg = Config.parse({"loss": loss, "negatives": 20, "calibration": 0.5})
    model, _ = build(cfg)
    batch = random_batch(Model.inputs(small_schema(), cfg), 7, rng_for(5, "rows"))
    logit = model(batch).detach().double().numpy() @ model.item_vectors().detach().double().numpy().T
    p = 1 / (1 + np.exp(-logit / cfg.temperature))
    drawn, share = model.negatives.draw(3).numpy(), 20 / 39
    for row, positive in enumerate(batch.sparse["item"].values().tolist()):
        others = drawn[drawn != positive]
        if loss == "bpr":
            difference = (logit[row, positive] - logit[row, others]) / cfg.temperature
            expected = np.log1p(np.exp(-difference)).mean()
        else:
            beta = share * (0.5 * (1 - 1 / share) + 1 / share)
            expected = -(beta * np.log(p[row, positive]) + np.log(1 - p[row, others]).sum()) / 21
        assert model.loss(batch, 3)[row].item() == pytest.approx(expected, rel=1e-3)
