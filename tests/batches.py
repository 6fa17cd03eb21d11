"""Small random batches for any schema, and the small schema that model tests share."""

import numpy as np
import torch
from torchrec import KeyedJaggedTensor

from recsys_dist.batch import Batch
from recsys_dist.feature_kinds import (
    Categorical,
    Cross,
    ListFeature,
    Numeric,
    Searches,
    Sequence,
    Sessions,
    Time,
)
from recsys_dist.models.protocol import Catalogue
from recsys_dist.schema import Label, Schema

ROWS = {"user": 30, "item": 40, "author": 12, "hour": 25, "user_x_author": 64, "searched": 21}


def small_schema() -> Schema:
    """Every kind of input a model can meet: ids of all sides, a cross, two sequences, words, two floats."""
    schema = Schema(
        features=(
            Categorical(name="user", column="users.household"),
            Categorical(name="item", column="item_id"),
            Categorical(name="author", column="items.author_id"),
            Time(name="hour", part="hour"),
            Cross(name="user_x_author", of=("user", "author"), hash_buckets=64),
            Sequence(name="watched", of="item", where="click", max_length=5),
            Sequence(name="watched_authors", of="author", where="click", max_length=5),
            Sessions(name="watched_sessions", where="click", max_length=5, sessions=3),
            Searches(name="searched", column="query", max_length=4, hash_buckets=20),
            Numeric(name="age", column="users.age"),
            Numeric(name="duration", column="items.duration"),
        ),
        labels=(Label(name="click"), Label(name="like"), Label(name="watch_ms", kind="value")),
        ranking_label="click",
        recall_positive=("click",),
    )
    return schema.fitted(ROWS)


def small_catalogue() -> Catalogue:
    """The 40 items: item i was wanted i times, has author 1 + i % 11 and some duration; row 0 has nothing.

    Id j of any table is in 1 + j % 7 training rows.
    """
    item = torch.arange(ROWS["item"], dtype=torch.int32)
    features = {
        "item": item,
        "author": (1 + item % 11) * (item > 0),
        "duration": torch.cos(item.float()) * (item > 0),
    }
    occurrences = {table: 1 + torch.arange(rows) % 7 for table, rows in ROWS.items()}
    return Catalogue(torch.arange(ROWS["item"]), features, occurrences=occurrences)


def random_batch(
    schema: Schema, rows: int, rng: np.random.Generator, columns: dict[str, np.ndarray] | None = None
) -> Batch:
    """Uniform ids from row 1, 0..max_length ids a sequence, normal floats, fair coins and seconds as labels.

    Lists of the same events are equally long. `columns` fixes single ids, floats or labels by name, or the
    only id of lists: [rows] each.
    """
    fixed = columns or {}
    values, lengths = [], []
    events = {_told(f): np.ones(rows, np.int64) for f in schema.lists if f.name in fixed}
    for feature in schema.keys:
        assert feature.rows is not None
        length = np.ones(rows, np.int64)
        if isinstance(feature, ListFeature):
            of = _told(feature)
            if of not in events:
                events[of] = rng.integers(0, feature.max_length + 1, rows)
            length = events[of]
        ids = fixed[feature.name] if feature.name in fixed else rng.integers(1, feature.rows, length.sum())
        if isinstance(feature, Sessions):  # the oldest first: they count down in each row
            ids = ids[np.lexsort((-ids, np.repeat(np.arange(rows), length)))]
        values.append(ids)
        lengths.append(length)
    sparse = KeyedJaggedTensor(
        keys=[feature.name for feature in schema.keys],
        values=torch.from_numpy(np.concatenate(values).astype(np.int32)),
        lengths=torch.from_numpy(np.concatenate(lengths).astype(np.int32)),
    )
    dense = [fixed[f.name] if f.name in fixed else rng.normal(size=rows) for f in schema.dense]
    labels = {
        label.name: fixed[label.name] if label.name in fixed else _outcomes(label, rows, rng)
        for label in schema.labels
    }
    return Batch(
        dense=torch.from_numpy(np.reshape(np.array(dense, np.float32).T, (rows, len(dense)))),
        sparse=sparse,
        labels={name: torch.from_numpy(np.asarray(y, np.float32)) for name, y in labels.items()},
        weight=torch.ones(rows),
        row_id=torch.arange(rows),
    )


def _told(feature: ListFeature) -> tuple[str | None, int]:
    """Which past events a list tells of."""
    return feature.name if isinstance(feature, Searches) else feature.where, feature.max_length


def _outcomes(label: Label, rows: int, rng: np.random.Generator) -> np.ndarray:
    return rng.integers(0, 2, rows) if label.kind == "binary" else rng.uniform(500, 2000, rows)


def take(batch: Batch, index: torch.Tensor) -> Batch:
    """The rows of `batch` at `index`, in that order."""
    keys = batch.sparse.keys()
    parts = [batch.sparse[key].to_dense() for key in keys]
    chosen = [part[i] for part in parts for i in index.tolist()]
    sparse = KeyedJaggedTensor(
        keys=keys,
        values=torch.cat(chosen) if chosen else batch.sparse.values()[:0],
        lengths=torch.tensor([len(ids) for ids in chosen], dtype=torch.int32),
    )
    labels = {name: label[index] for name, label in batch.labels.items()}
    return Batch(batch.dense[index], sparse, labels, batch.weight[index], batch.row_id[index])
