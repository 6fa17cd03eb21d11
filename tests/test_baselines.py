"""Baselines against hand-computed numbers and dense linear algebra."""

import numpy as np
import pytest

from recsys_dist.baselines import (
    ItemCosine,
    LabelCounts,
    TargetEncoding,
    encoded_columns,
    history_scores,
    popularity_scores,
)
from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError, DataError
from tests.batches import small_schema

SCHEMA = small_schema()


def logit(p: float) -> float:
    return float(np.log(p / (1 - p)))


def test_target_encoding_by_hand() -> None:
    ids = {"user": np.array([1, 1, 1, 2]), "author": np.array([3, 3, 4, 4])}
    labels = np.array([1, 1, 0, 0])
    encoding = TargetEncoding.fit(LabelCounts.of(ids, labels, SCHEMA), smoothing=2)
    scores = encoding.scores({"user": np.array([1, 2, 29]), "author": np.array([3, 4, 0])})
    # prior 1/2; user 1: (2 + 1) / (3 + 2), author 3: (2 + 1) / (2 + 2); ids never seen say nothing
    expected = [logit(3 / 5) + logit(3 / 4), logit(1 / 3) + logit(1 / 4), 0.0]
    np.testing.assert_allclose(scores, expected, atol=1e-12)


def test_counts_add_up_over_files() -> None:
    rng = rng_for(0, "counts")
    ids = {"user": rng.integers(0, 30, 100), "item": rng.integers(0, 40, 100)}
    labels = rng.integers(0, 2, 100)
    whole = LabelCounts.of(ids, labels, SCHEMA)
    files = [
        LabelCounts.of({name: column[part] for name, column in ids.items()}, labels[part], SCHEMA)
        for part in np.array_split(np.arange(100), 7)
    ]
    merged = files[0].merge(*files[1:])
    for name in ids:
        np.testing.assert_array_equal(merged.seen[name], whole.seen[name])
        np.testing.assert_array_equal(merged.positive[name], whole.positive[name])


def test_only_single_ids_can_be_encoded() -> None:
    assert encoded_columns(SCHEMA, None) == ["item"], "attributes of a user repeat what her id says"
    assert encoded_columns(SCHEMA, ("hour",)) == ["hour"]
    with pytest.raises(DataError, match="sequence feature 'watched'"):
        encoded_columns(SCHEMA, ("watched",))
    with pytest.raises(ConfigError, match="did you mean 'user'"):
        encoded_columns(SCHEMA, ("usr",))


def test_one_class_has_no_rates() -> None:
    counts = LabelCounts.of({"user": np.array([1, 2])}, np.array([1, 1]), SCHEMA)
    with pytest.raises(DataError, match="2 of 2 training rows are positive"):
        TargetEncoding.fit(counts)


def test_popularity_has_no_ties() -> None:
    scores = popularity_scores(np.array([0, 5, 7, 5]))
    assert np.argsort(-scores).tolist() == [2, 1, 3, 0]
    assert len(np.unique(scores)) == 4


def test_item_cosine_is_the_cosine_of_binary_columns() -> None:
    rng = rng_for(1, "cosine")
    shown = rng.random((30, 12)) < 0.3
    shown[:, 0] = False
    cosine = ItemCosine.empty(12)
    for users in np.array_split(np.arange(30), 4):
        at, items = np.nonzero(shown[users])
        cosine.add(np.r_[at, at[:2]], np.r_[items, items[:2]])  # a pair listed twice is one pair
    columns = shown.astype(float)
    norm = np.maximum(np.linalg.norm(columns, axis=0), 1)
    expected = columns.T @ columns / np.outer(norm, norm)
    np.fill_diagonal(expected, 0)
    similarity = cosine.similarity()
    np.testing.assert_allclose(similarity, expected, atol=1e-6)
    offsets = np.r_[0, np.cumsum(shown.sum(axis=1))]
    scores = history_scores(offsets, np.nonzero(shown)[1], similarity)
    np.testing.assert_allclose(scores, columns @ expected, atol=1e-5)
    assert history_scores(np.array([0, 0]), np.empty(0, int), similarity).tolist() == [[0.0] * 12]
