"""Metrics against hand-computed numbers, scikit-learn and brute force; merged states equal the whole."""

import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import log_loss, ndcg_score, roc_auc_score

from recsys_dist.config import rng_for
from recsys_dist.errors import DataError
from recsys_dist.metrics import (
    RankingState,
    RetrievalState,
    auc,
    expected_calibration_error,
    gauc,
    intervals,
    logloss,
    ranking_replicates,
    reliability,
    retrieval_replicates,
)
from recsys_dist.metrics.bootstrap import user_weights
from recsys_dist.metrics.ranking import ScoreOrder, UserAuc


def random_state(seed: int, rows: int, users: int = 9, distinct: int = 12) -> RankingState:
    """Rows with many tied scores and a few users without both labels."""
    rng = rng_for(seed, "rows")
    user = rng.integers(0, users, rows)
    label = (rng.random(rows) < np.where(user < 2, user, 0.4)).astype(np.float32)
    return RankingState(rng.integers(-distinct, distinct, rows) / 4, label, user)


def test_auc_by_hand() -> None:
    scores, labels = np.array([0.1, 0.4, 0.35, 0.8]), np.array([0, 0, 1, 1])
    assert auc(scores, labels) == 0.75  # of 4 pairs only (.35, .4) is the wrong way round
    assert auc(np.array([1.0, 1.0, 2.0]), np.array([0, 1, 1])) == 0.75  # a tie and a win
    assert auc(-scores, labels) == 0.25


@given(st.integers(0, 10_000), st.integers(2, 60))
def test_auc_and_gauc_agree_with_scikit_learn(seed: int, rows: int) -> None:
    state = random_state(seed, rows)
    if 0 < state.labels.sum() < rows:
        assert auc(state.scores, state.labels) == pytest.approx(roc_auc_score(state.labels, state.scores))
    total, weight = 0.0, 0
    for user in np.unique(state.users):
        mine = state.users == user
        if 0 < state.labels[mine].sum() < mine.sum():
            total += mine.sum() * roc_auc_score(state.labels[mine], state.scores[mine])
            weight += mine.sum()
    expected = total / weight if weight else np.nan
    assert gauc(state.scores, state.labels, state.users) == pytest.approx(expected, nan_ok=True)


def test_gauc_weighs_users_by_exposures_and_skips_one_sided_ones() -> None:
    users = np.array(["b", "b", "a", "a", "a", "c"])
    labels = np.array([0, 1, 1, 0, 0, 1])
    scores = np.array([0.0, 1.0, 0.5, 0.9, 0.1, 9.0])
    assert gauc(scores, labels, users) == pytest.approx((2 * 1.0 + 3 * 0.5) / 5)


def test_logloss_by_hand_and_without_clipping() -> None:
    p, labels = np.array([0.9, 0.2, 0.6]), np.array([1, 0, 0])
    expected = -(np.log(0.9) + np.log(0.8) + np.log(0.4)) / 3
    assert logloss(np.log(p / (1 - p)), labels) == pytest.approx(expected)
    assert logloss(np.log(p / (1 - p)), labels) == pytest.approx(log_loss(labels, p))
    assert logloss(np.array([1000.0, -1000.0]), np.array([0, 0])) == 500.0


def test_calibration_by_hand() -> None:
    p = np.repeat([0.2, 0.6], [10, 10])
    labels = np.r_[np.ones(3), np.zeros(7), np.ones(6), np.zeros(4)]
    scores = np.log(p / (1 - p))
    table = reliability(scores, labels, bins=2)
    assert table.rows.tolist() == [10, 10]
    np.testing.assert_allclose(table.predicted, [0.2, 0.6])
    np.testing.assert_allclose(table.observed, [0.3, 0.6])
    assert expected_calibration_error(scores, labels, bins=2) == pytest.approx(0.05)
    # equal probabilities are never torn apart: 20 bins over 2 values are 2 bins
    assert len(reliability(scores, labels, bins=20).rows) == 2


def test_true_probabilities_are_calibrated() -> None:
    rng = rng_for(0, "calibrated")
    scores = rng.normal(size=50_000)
    labels = rng.random(50_000) < 1 / (1 + np.exp(-scores))
    assert expected_calibration_error(scores, labels.astype(float)) < 0.012
    assert expected_calibration_error(scores + 1, labels.astype(float)) > 0.15
    metrics = RankingState(scores, labels.astype(float), np.arange(50_000)).compute()
    assert metrics["predicted_over_observed"] == pytest.approx(1, abs=0.02)


@settings(max_examples=50)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 80), max_size=5))
def test_any_split_in_any_order_gives_the_same_bits(seed: int, cuts: list[int]) -> None:
    whole = random_state(seed, 80)
    order = rng_for(seed, "order").permutation(80)
    parts = [
        RankingState(whole.scores[i], whole.labels[i], whole.users[i]) for i in np.split(order, np.sort(cuts))
    ]
    merged = parts[0].merge(*parts[1:])
    assert repr(merged.compute()) == repr(whole.compute())
    assert repr(intervals(ranking_replicates(merged, 3))) == repr(intervals(ranking_replicates(whole, 3)))


def test_undefined_metrics_are_nan() -> None:
    empty = RankingState(np.empty(0), np.empty(0), np.empty(0, np.int64))
    metrics = empty.compute()
    assert metrics["rows"] == 0 and all(np.isnan(metrics[m]) for m in ("auc", "gauc", "logloss", "ece"))
    assert np.isnan(intervals(ranking_replicates(empty))["auc"]).all()
    one_class = RankingState(np.arange(3.0), np.ones(3), np.zeros(3, np.int64))
    metrics = one_class.compute()
    assert np.isnan(metrics["auc"]) and np.isnan(metrics["gauc"]) and metrics["logloss"] > 0
    assert np.isnan(intervals(ranking_replicates(one_class, 10))["auc"]).all()


def test_nan_scores_are_refused() -> None:
    with pytest.raises(DataError, match="1 of 2 scores are NaN"):
        auc(np.array([np.nan, 1.0]), np.array([0, 1]))


def test_weighted_auc_counts_rows_as_often_as_drawn() -> None:
    """A bootstrap replicate equals the metric of rows repeated as often as their user was drawn."""
    state = random_state(3, 60)
    for weight in user_weights(9, replicates=5, seed=1):
        repeated = np.repeat(np.arange(60), weight[state.users])
        expected = auc(state.scores[repeated], state.labels[repeated])
        assert ScoreOrder.of(state.scores).auc(state.labels, weight[state.users]) == pytest.approx(expected)
        copies = np.concatenate([np.arange(n) for n in weight[state.users]])
        users = state.users[repeated] * 100 + copies  # each draw of a user is a user of its own
        expected = gauc(state.scores[repeated], state.labels[repeated], users)
        assert UserAuc.of(state.scores, state.labels, state.users).gauc(weight) == pytest.approx(expected)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    covered = []
    for trial in range(60):
        rng = rng_for(trial, "coverage")
        users = np.repeat(np.arange(120), 5)
        label = rng.random(600) < 0.5
        taste = rng.normal(size=120)[users]  # shifts all of a user's scores: rows are not independent
        scores = taste + rng.normal(size=600) + label
        drawn = ranking_replicates(RankingState(scores, label, users), replicates=100, seed=trial)
        low, high = intervals(drawn)["auc"]
        covered.append(low <= 0.6915 <= high)  # Φ(1/√4): normals with a shift of 1 and variance 2 each
    assert 0.85 <= np.mean(covered) <= 1.0


def test_intervals_follow_their_seed_and_hold_the_estimate() -> None:
    state = random_state(5, 2_000, users=200)
    first, metrics = intervals(ranking_replicates(state, 50, seed=1)), state.compute()
    assert first == intervals(ranking_replicates(state, 50, seed=1))
    assert first != intervals(ranking_replicates(state, 50, seed=2))
    for name in ("auc", "gauc", "logloss"):
        low, high = first[name]
        assert low < metrics[name] < high


def test_intervals_of_a_hundred_thousand_rows_take_seconds() -> None:
    state = random_state(6, 100_000, users=10_000, distinct=100_000)
    started = time.perf_counter()
    ranking_replicates(state, replicates=20)
    assert time.perf_counter() - started < 3


TOP = np.array([[3, 1, 2], [2, 3, 1], [1, 2, 3], [4, 3, -1]])
OFFSETS, ITEMS = np.array([0, 1, 3, 3, 6]), np.array([1, 3, 4, 3, 0, 0])


def test_retrieval_by_hand() -> None:
    """Users want {1}, {3, 4}, nothing, {3, and two items that training never saw}."""
    metrics = RetrievalState.of(TOP, OFFSETS, ITEMS, item_rows=6).compute((1, 2, 3))
    assert [metrics[f"recall@{k}"] for k in (1, 2, 3)] == [0, 3 / 6, 3 / 6]
    assert metrics["user_recall@2"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    second, ideal_two = 1 / np.log2(3), 1 + 1 / np.log2(3)
    assert metrics["ndcg@2"] == pytest.approx((second + second / ideal_two + second / ideal_two) / 3)
    assert [metrics[f"coverage@{k}"] for k in (1, 2, 3)] == [4 / 5, 4 / 5, 4 / 5]
    assert metrics["users"] == 3 and metrics["pairs"] == 6


def test_ndcg_of_full_rankings_agrees_with_scikit_learn() -> None:
    rng = rng_for(0, "ndcg")
    scores, wanted = rng.normal(size=(20, 15)), rng.random((20, 15)) < 0.2
    wanted[:, 0] = True
    top = np.argsort(-scores, axis=1) + 1
    offsets = np.r_[0, np.cumsum(wanted.sum(axis=1))]
    state = RetrievalState.of(top, offsets, np.nonzero(wanted)[1] + 1, item_rows=16)
    for k in (1, 5, 10):
        assert state.compute((k,))[f"ndcg@{k}"] == pytest.approx(ndcg_score(wanted, scores, k=k))


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(0, 40))
def test_users_split_over_workers_give_the_same_bits(seed: int, cut: int) -> None:
    rng = rng_for(seed, "lists")
    top = np.argsort(rng.random((40, 25)), axis=1)[:, :10] + 1
    wanted = [rng.choice(25, rng.integers(0, 6), replace=False) + 1 for _ in range(40)]

    def state(users: range) -> RetrievalState:
        chosen = [wanted[u] for u in users]
        offsets = np.r_[0, np.cumsum([len(w) for w in chosen])].astype(int)
        return RetrievalState.of(top[users], offsets, np.concatenate([*chosen, []]).astype(int), 26)

    merged = state(range(cut)).merge(state(range(cut, 40)))
    assert merged.compute((1, 5, 10)) == state(range(40)).compute((1, 5, 10))


def test_retrieval_intervals_resample_users() -> None:
    state = RetrievalState.of(TOP, OFFSETS, ITEMS, item_rows=6)
    drawn = intervals(retrieval_replicates(state, (2,), replicates=2_000), level=0.9999)
    # the extremes of 3 users with (found, wanted) of (1, 1), (1, 2), (1, 3), drawn thrice each
    assert drawn["recall@2"] == pytest.approx((1 / 3, 1.0))
    means = [np.mean(users) for users in product([1, 1 / 2, 1 / 3], repeat=3)]
    assert drawn["user_recall@2"] == pytest.approx((min(means), max(means)))


def test_malformed_truth_is_refused() -> None:
    with pytest.raises(DataError, match="once each"):
        RetrievalState.of(TOP[:1], np.array([0, 2]), np.array([3, 3]), 6)
    with pytest.raises(DataError, match="truth of 1 users"):
        RetrievalState.of(TOP, np.array([0, 1]), np.array([3]), 6)
    with pytest.raises(DataError, match="lists of 9 items"):
        RetrievalState.of(TOP, OFFSETS, ITEMS, 6).compute((9,))
    nobody = RetrievalState.of(TOP[:0], np.array([0]), np.empty(0, int), 6)
    assert np.isnan(nobody.compute((2,))["recall@2"])
    assert np.isnan(intervals(retrieval_replicates(nobody, (2,)))["ndcg@2"]).all()
