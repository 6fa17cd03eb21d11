"""Percentile intervals by resampling users (cluster bootstrap, Field & Welsh 2007, JRSS B 69:3).

Rows of one user are not independent, so whole users are drawn, with replacement. Every replicate only
changes how often a user counts: rows are sorted once and weighed anew. The same seed draws the same
users, so intervals of two models on the same rows can be compared, or their difference taken.

R replicates, U users, N rows
"""

from collections.abc import Callable, Iterator

import numpy as np

from recsys_dist.config import rng_for
from recsys_dist.metrics.ranking import (
    RankingState,
    ScoreOrder,
    UserAuc,
    reliability,
    row_logloss,
    sigmoid,
    user_codes,
)
from recsys_dist.metrics.retrieval import RetrievalState

Intervals = dict[str, tuple[float, float]]


def user_weights(users: int, replicates: int, seed: int) -> Iterator[np.ndarray]:
    """R times [U] int64: how often each user is drawn in U draws."""
    for replicate in range(replicates):
        drawn = rng_for(seed, "bootstrap", replicate).integers(0, users, users)
        yield np.bincount(drawn, minlength=users)


def ranking_intervals(
    state: RankingState, replicates: int = 200, seed: int = 0, level: float = 0.95
) -> Intervals:
    """Interval of auc, gauc, logloss and ece; ece keeps the bins of the whole sample."""
    if len(state.scores) == 0:
        return dict.fromkeys(("auc", "gauc", "logloss", "ece"), (np.nan, np.nan))
    codes = user_codes(state.users)
    order = ScoreOrder.of(state.scores)
    by_user = UserAuc.of(state.scores, state.labels, codes)
    loss = np.bincount(codes, row_logloss(state.scores, state.labels))
    gap = _calibration(state)

    def replicate(weight: np.ndarray) -> tuple[float, float, float, float]:
        of_row = weight[codes]
        rows = (weight * by_user.exposures).sum()
        return (
            order.auc(state.labels, of_row),
            by_user.gauc(weight),
            float((weight * loss).sum() / rows),
            gap(of_row),
        )

    drawn = np.array([replicate(w) for w in user_weights(len(loss), replicates, seed)])
    return _percentiles(["auc", "gauc", "logloss", "ece"], drawn, level)


def retrieval_intervals(
    state: RetrievalState,
    ks: tuple[int, ...],
    replicates: int = 200,
    seed: int = 0,
    level: float = 0.95,
) -> Intervals:
    """Interval of `recall@k`, `user_recall@k` and `ndcg@k` for each k."""
    wanted = state.wanted[state.wanted > 0]
    names = [f"{name}@{k}" for k in ks for name in ("recall", "user_recall", "ndcg")]
    if len(wanted) == 0:
        return dict.fromkeys(names, (np.nan, np.nan))
    columns: list[np.ndarray] = []
    for k in ks:
        found, recall, ndcg = state.per_user(k)
        columns += [found / wanted.mean(), recall, ndcg]
    values_UM = np.array(columns).T
    pairs = np.array([True, False, False] * len(ks))  # recall@k is per wanted pair, the others per user
    drawn = np.array(
        [
            w @ values_UM / np.where(pairs, w @ wanted / wanted.mean(), len(wanted))
            for w in user_weights(len(wanted), replicates, seed)
        ]
    )
    return _percentiles(names, drawn, level)


def _calibration(state: RankingState) -> Callable[[np.ndarray], float]:
    """The calibration error as a function of row weights."""
    table = reliability(state.scores, state.labels)
    bins = len(table.rows)
    excess = sigmoid(state.scores) - state.labels

    def error(weights: np.ndarray) -> float:
        gap = np.abs(np.bincount(table.bin, weights * excess, bins)).sum()
        return float(gap / weights.sum())

    return error


def _percentiles(names: list[str], drawn_RM: np.ndarray, level: float) -> Intervals:
    """Percentiles over replicates; those where a metric is undefined (one class drawn) are left out."""
    tails = [(1 - level) / 2, (1 + level) / 2]
    intervals: Intervals = {}
    for name, values in zip(names, drawn_RM.T, strict=True):
        defined = values[~np.isnan(values)]
        low, high = np.quantile(defined, tails) if len(defined) else (np.nan, np.nan)
        intervals[name] = (float(low), float(high))
    return intervals
