"""Baselines against hand-computed numbers and dense linear algebra."""

from collections.abc import Callable

import numpy as np
import pytest
import scipy.sparse as sp

from recsys_dist.baselines import (
    LabelCounts,
    TargetEncoding,
    encoded_columns,
    history_scores,
    incidence,
    nearest_items,
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


def shown_to(users: int, items: int) -> np.ndarray:
    shown = rng_for(1, "cosine").random((users, items)) < 0.3
    shown[:, 0] = False
    return shown


def cosine_of(shown: np.ndarray) -> np.ndarray:
    columns = shown.astype(float)
    users = np.maximum(columns.sum(axis=0), 1)
    cosine = columns.T @ columns / np.sqrt(np.outer(users, users))
    np.fill_diagonal(cosine, 0)
    return cosine


@pytest.mark.parametrize("most", [1, 4, 12])
def test_nearest_items_are_those_of_the_largest_cosine(most: int) -> None:
    shown = shown_to(30, 12)
    at, items = np.nonzero(shown)
    expected = cosine_of(shown)
    found = incidence(np.r_[at, at[:2]], np.r_[items, items[:2]], 30, 12)  # a pair listed twice is one pair
    for some in (np.arange(0, 12, 2), np.arange(1, 12, 2)):
        item, other, cosine = nearest_items(found, some, most)
        assert np.isin(item, some).all()
        np.testing.assert_allclose(cosine, expected[item, other], rtol=1e-6)
        for one in some:  # the best, ties by row
            ranked = np.argsort(-expected[one], kind="stable")[:most]
            assert other[item == one].tolist() == [row for row in ranked if expected[one, row] > 0]


@pytest.mark.parametrize("form", [np.asarray, sp.csr_matrix])
def test_history_scores_sum_the_similarities(
    form: Callable[[np.ndarray], np.ndarray | sp.csr_matrix],
) -> None:
    shown = shown_to(30, 12)
    cosine = cosine_of(shown).astype(np.float32)
    offsets = np.r_[0, np.cumsum(shown.sum(axis=1))]
    scores = history_scores(offsets, np.nonzero(shown)[1], form(cosine))
    np.testing.assert_allclose(scores, shown @ cosine.astype(float), atol=1e-5)
    assert history_scores(np.array([0, 0]), np.empty(0, int), form(cosine)).tolist() == [[0.0] * 12]
