"""Percentile intervals by resampling users (cluster bootstrap, Field & Welsh 2007, JRSS B 69:3).

Rows of one user are not independent, so whole users are drawn, with replacement. Every replicate only
changes how often a user counts: rows are sorted once and weighed anew. The same seed draws the same
users, so two models on the same rows can be compared: the interval of the difference of their replicates.

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

Replicates = dict[str, np.ndarray]  # metric -> [R]
Intervals = dict[str, tuple[float, float]]

_RANKING = ("auc", "gauc", "logloss", "ece")


def user_weights(users: int, replicates: int, seed: int) -> Iterator[np.ndarray]:
    """R times [U] int64: how often each user is drawn in U draws."""
    for replicate in range(replicates):
        drawn = rng_for(seed, "bootstrap", replicate).integers(0, users, users)
        yield np.bincount(drawn, minlength=users)


def ranking_replicates(state: RankingState, replicates: int = 200, seed: int = 0) -> Replicates:
    """auc, gauc, logloss and ece of each replicate; ece keeps the bins of the whole sample."""
    if len(state.scores) == 0:
        return dict.fromkeys(_RANKING, np.full(replicates, np.nan))
    state = state.ordered()
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

    drawn = [replicate(w) for w in user_weights(len(loss), replicates, seed)]
    return dict(zip(_RANKING, np.array(drawn).T, strict=True))


def retrieval_replicates(
    state: RetrievalState, ks: tuple[int, ...], replicates: int = 200, seed: int = 0
) -> Replicates:
    """`recall@k`, `user_recall@k` and `ndcg@k` for each k, of each replicate."""
    wanted = state.wanted[state.wanted > 0]
    names = [f"{name}@{k}" for k in ks for name in ("recall", "user_recall", "ndcg")]
    if len(wanted) == 0:
        return dict.fromkeys(names, np.full(replicates, np.nan))
    columns: list[np.ndarray] = []
    for k in ks:
        found, recall, ndcg = state.per_user(k)
        columns += [found, recall, ndcg]
    values_UM = np.array(columns).T
    pairs = np.array([True, False, False] * len(ks))  # recall@k is per wanted pair, the others per user
    drawn = [
        w @ values_UM / np.where(pairs, w @ wanted, len(wanted))
        for w in user_weights(len(wanted), replicates, seed)
    ]
    return dict(zip(names, np.array(drawn).T, strict=True))


def intervals(replicates: Replicates, level: float = 0.95) -> Intervals:
    """Percentile interval of each metric; replicates that lack it (one class drawn) are left out."""
    tails = [(1 - level) / 2, (1 + level) / 2]
    found: Intervals = {}
    for name, values in replicates.items():
        defined = values[~np.isnan(values)]
        low, high = np.quantile(defined, tails) if len(defined) else (np.nan, np.nan)
        found[name] = (float(low), float(high))
    return found


def _calibration(state: RankingState) -> Callable[[np.ndarray], float]:
    """The calibration error as a function of row weights."""
    table = reliability(state.scores, state.labels)
    bins = len(table.rows)
    excess = sigmoid(state.scores) - state.labels

    def error(weights: np.ndarray) -> float:
        gap = np.abs(np.bincount(table.bin, weights * excess, bins)).sum()
        return float(gap / weights.sum())

    return error
