"""Histories for tests: the smallest schema that has them, and rows laid out by hand."""

from collections.abc import Sequence as Rows

import numpy as np
import torch
from torchrec import KeyedJaggedTensor

from recsys_dist.batch import Batch
from recsys_dist.feature_kinds import Categorical, Sequence, Sessions
from recsys_dist.models.behaviours import History, Segments
from recsys_dist.schema import Label, Schema

ITEMS = 41


def history_schema(max_length: int = 50) -> Schema:
    """A candidate, what was clicked before, and in which session."""
    schema = Schema(
        features=(
            Categorical(name="item", column="item_id"),
            Sequence(name="clicked", of="item", where="click", max_length=max_length),
            Sessions(name="sessions", where="click", max_length=max_length, sessions=3),
        ),
        labels=(Label(name="click"),),
        ranking_label="click",
        recall_positive=("click",),
    )
    return schema.fitted({"item": ITEMS})


def batch_of(
    item: np.ndarray,
    clicked: Rows[Rows[int]],
    click: np.ndarray,
    sessions: Rows[Rows[int]] | None = None,
) -> Batch:
    """Rows of `history_schema`; one session each where none are given."""
    rows = len(item)
    events = [i for ids in clicked for i in ids]
    numbers = [1] * len(events) if sessions is None else [i for ids in sessions for i in ids]
    lengths = [len(ids) for ids in clicked]
    sparse = KeyedJaggedTensor(
        keys=["item", "clicked", "sessions"],
        values=torch.tensor([*item, *events, *numbers], dtype=torch.int32),
        lengths=torch.tensor([1] * rows + lengths + lengths, dtype=torch.int32),
    )
    label = torch.from_numpy(np.asarray(click, np.float32))
    return Batch(torch.zeros(rows, 0), sparse, {"click": label}, torch.ones(rows), torch.arange(rows))


def random_history(rng: np.random.Generator, lengths: list[int], width: int) -> History:
    """Doubles that gradients flow to, negatives too."""

    def drawn(rows: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=(rows, width))).requires_grad_()

    tokens = sum(lengths)
    segments = Segments(torch.tensor(lengths), tokens)
    return History(drawn(tokens), drawn(len(lengths)), segments, drawn(tokens))


def numeric_gradient(function, x: np.ndarray, step: float = 1e-6) -> np.ndarray:  # type: ignore[no-untyped-def]
    """Central differences of a scalar function of `x`."""
    gradient = np.zeros_like(x)
    for at in np.ndindex(*x.shape):
        for sign in (1, -1):
            moved = x.copy()
            moved[at] += sign * step
            gradient[at] += sign * function(moved) / (2 * step)
    return gradient
