"""DSIN by its equations, and by an effect that only sessions tell."""

import numpy as np
import pytest
import torch

from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError
from recsys_dist.feature_kinds import Sessions
from recsys_dist.models import dsin
from tests.batches import small_schema
from tests.models.histories import ITEMS, batch_of, numeric_gradient, random_history
from tests.models.test_contract import outputs, train
from tests.models.test_dien import build
from tests.models.test_recurrence import sigmoid

WIDTH, HEADS = 4, 2
SESSIONS = [[2, 2, 1], [], [1], [3, 2, 2, 2, 2, 1]]  # of each row's behaviours
LENGTHS = [len(row) for row in SESSIONS]


def softmax(x: np.ndarray) -> np.ndarray:
    exp = np.exp(x - x.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def normed(x: np.ndarray, norm: torch.nn.LayerNorm) -> np.ndarray:
    scale, shift = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + norm.eps) * scale + shift


def plain_extractor(model: dsin.SessionInterest, q: np.ndarray, number: int) -> np.ndarray:
    """[E] I_k of one session [L, E]: bias encoding, heads one by one, FFN, mean."""
    of = {name: weight.detach().numpy() for name, weight in model.named_parameters()}
    q = q + of["bias.session"][number] + of["bias.place"][: len(q), None] + of["bias.unit_E"]
    heads = []
    projected = np.split(q @ of["attention.projected.weight"].T, 3, axis=1)
    for query, key, value in zip(*(np.split(part, HEADS, axis=1) for part in projected), strict=True):
        heads.append(softmax(query @ key.T / np.sqrt(WIDTH)) @ value)
    x = normed(q + np.hstack(heads) @ of["attention.joined.weight"].T, model.attention.first_norm)
    layers = [of[f"attention.ffn.layers.{i}.{kind}"] for i in (0, 2) for kind in ("weight", "bias")]
    ffn = np.maximum(x @ layers[0].T + layers[1], 0) @ layers[2].T + layers[3]
    return normed(x + ffn, model.attention.last_norm).mean(0)


def plain_lstm(lstm: torch.nn.LSTM, x: np.ndarray, suffix: str) -> np.ndarray:
    """[K, E] states of one direction."""
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    of_x, of_h, bias_x, bias_h = (getattr(lstm, name + suffix).detach().numpy() for name in names)
    h = c = np.zeros(WIDTH)
    out = []
    for x_t in x:
        i, f, g, o = np.split(of_x @ x_t + bias_x + of_h @ h + bias_h, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.array(out)


def plain(model: dsin.SessionInterest, behaviour: np.ndarray, query: np.ndarray) -> np.ndarray:
    """[B, 3E] row by row and session by session."""
    out = np.zeros((len(LENGTHS), 3 * WIDTH))
    for row, (first, numbers) in enumerate(zip(np.cumsum([0, *LENGTHS]), SESSIONS, strict=False)):
        if not numbers:
            continue
        at = first + np.arange(len(numbers))
        oldest_first = sorted(set(numbers), reverse=True)
        interest = np.array(
            [plain_extractor(model, behaviour[at[np.equal(numbers, k)]], k) for k in oldest_first]
        )
        backward = plain_lstm(model.lstm, interest[::-1], "_reverse")[::-1]
        context = np.hstack([plain_lstm(model.lstm, interest, ""), backward])
        for x, linear, columns in (
            (interest, model.of_interest, slice(0, WIDTH)),
            (context, model.of_context, slice(WIDTH, 3 * WIDTH)),
        ):
            out[row, columns] = softmax(x @ linear.weight.detach().numpy() @ query[row]) @ x
    return out


def test_interest_and_its_gradient_are_those_of_the_equations() -> None:
    rng = rng_for(0, "dsin")
    torch.manual_seed(0)
    sessions = Sessions(name="sessions", max_length=6, sessions=3)
    model = dsin.SessionInterest(WIDTH, sessions, dsin.Config(heads=HEADS, embedding_std=0.7)).double()
    for weight in model.bias.parameters():
        torch.nn.init.normal_(weight)
    history = random_history(rng, LENGTHS, WIDTH)
    behaviour, query = history.behaviour_VE.detach().numpy(), history.query_BE.detach().numpy()
    found = model(history, torch.tensor([k for row in SESSIONS for k in row]))
    np.testing.assert_allclose(found.detach(), plain(model, behaviour, query), rtol=1e-9)
    weight = rng.normal(size=found.shape)
    (found * torch.from_numpy(weight)).sum().backward()
    for leaf, loss in (
        (history.behaviour_VE, lambda x: (plain(model, x, query) * weight).sum()),
        (history.query_BE, lambda x: (plain(model, behaviour, x) * weight).sum()),
    ):
        np.testing.assert_allclose(leaf.grad, numeric_gradient(loss, leaf.detach().numpy()), atol=1e-7)


def together(rows: int, seed: int) -> Batch:
    """Items 1 and 2 among four, in two sessions of two: a click if both are in the same one."""
    rng = rng_for(seed, "sessions")
    click = rng.integers(0, 2, rows)
    clicked = rng.integers(3, ITEMS, (rows, 4))
    of_first = rng.integers(0, 2, rows)  # session of item 1
    of_second = np.where(click == 1, of_first, 1 - of_first)
    first = 2 * of_first + rng.integers(0, 2, rows)
    second = np.where(click == 1, first ^ 1, 2 * of_second + rng.integers(0, 2, rows))
    clicked[np.arange(rows), first], clicked[np.arange(rows), second] = 1, 2
    return batch_of(rng.integers(1, ITEMS, rows), clicked.tolist(), click, [[2, 2, 1, 1]] * rows)


def test_what_happens_within_a_session_is_seen_by_dsin_and_not_by_din() -> None:
    right = {}
    for name in ("din", "dsin"):
        model = build(name)
        train(model, together(800, 0), steps=80)
        held_out = together(1000, 1)
        right[name] = ((outputs(model, held_out) > 0) == (held_out.labels["click"] > 0)).float().mean()
    assert right["dsin"] > 0.9 and 0.42 < right["din"] < 0.58


def test_a_schema_without_sessions_is_refused() -> None:
    schema = small_schema().select(f.name for f in small_schema().features if f.name != "watched_sessions")
    with pytest.raises(
        ConfigError, match=r"no history has sessions; give the schema Sessions\(name='sessions'"
    ):
        dsin.Model.inputs(schema, dsin.Config())
    with pytest.raises(ConfigError, match="heads=3 does not divide the behaviours' width 32"):
        dsin.Model(dsin.Config(heads=3), small_schema())


@pytest.mark.parametrize("length", [0, 1, 10_000])
def test_histories_of_any_length(length: int) -> None:
    model = build("dsin", max_length=10_000)
    batch = batch_of(np.array([3]), [[1] * length], np.ones(1))
    model.loss(batch, 0).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
