"""Metrics of predicted probabilities: AUC, GAUC, log loss, calibration.

Scores are logits. A metric that is not defined on its rows (AUC of one class, any of none) is NaN.
Counts are integers and sums of floats run in sorted order, so that the same rows give the same bits
in whatever order, and on however many workers, they were scored.

N rows, U users, T groups of tied scores
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from recsys_dist.errors import DataError


@dataclass(frozen=True)
class ScoreOrder:
    """Rows sorted by score once, to be weighed many times.

    order  [N] rows by ascending score
    tie    [N] for each sorted row the group of equal scores that it is in, 0..T-1
    """

    order: np.ndarray
    tie: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray) -> Self:
        _refuse_nan(scores)
        order = np.argsort(scores, kind="stable")
        ranked = scores[order]
        return cls(order, _runs(ranked))

    def auc(self, labels: np.ndarray, weights: np.ndarray | None = None) -> float:
        """P(score of a positive > score of a negative) + ½ P(equal), rows weighed by `weights` [N]."""
        y = labels[self.order] > 0
        w = np.ones(len(y), np.int64) if weights is None else weights[self.order]
        groups = int(self.tie[-1]) + 1 if len(y) else 0
        positive_T = np.bincount(self.tie, np.where(y, w, 0), groups)
        negative_T = np.bincount(self.tie, np.where(y, 0, w), groups)
        below_T = np.cumsum(negative_T) - negative_T
        pairs = positive_T.sum() * negative_T.sum()
        return float((positive_T * (below_T + 0.5 * negative_T)).sum() / pairs) if pairs > 0 else np.nan


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Area under the ROC curve over scores and 0/1 labels [N]; ties count half. DataError on NaN scores."""
    return ScoreOrder.of(scores).auc(labels)


@dataclass(frozen=True)
class UserAuc:
    """AUC within each user: what GAUC averages.

    auc        [U] NaN for users without both labels
    exposures  [U] rows of the user
    """

    auc: np.ndarray
    exposures: np.ndarray

    @classmethod
    def of(cls, scores: np.ndarray, labels: np.ndarray, user_codes: np.ndarray) -> Self:
        """`user_codes` [N] are 0..U-1. One sort by (user, score); no loop over users."""
        _refuse_nan(scores)
        order = np.lexsort((scores, user_codes))
        user, score, y = user_codes[order], scores[order], labels[order] > 0
        tie = _runs(user, score)
        first = np.flatnonzero(np.diff(tie, prepend=-1))
        positive_T = np.bincount(tie, y).astype(np.int64)
        negative_T = np.bincount(tie, ~y).astype(np.int64)
        user_T = user[first]
        exposures = np.bincount(user_codes)
        positives = np.bincount(user_T, positive_T, len(exposures)).astype(np.int64)
        negatives = exposures - positives
        before_U = np.cumsum(negatives) - negatives  # negatives of all earlier users
        below_T = np.cumsum(negative_T) - negative_T - before_U[user_T]
        won_twice = np.bincount(user_T, positive_T * (2 * below_T + negative_T), len(exposures))
        with np.errstate(invalid="ignore"):
            return cls(won_twice / (2 * positives * negatives), exposures)

    def gauc(self, weights: np.ndarray | None = None) -> float:
        """Σ_u n_u·AUC_u / Σ_u n_u over users with both labels, n_u exposures; users weighed by `weights`."""
        defined = ~np.isnan(self.auc)
        n = self.exposures if weights is None else self.exposures * weights
        total = n[defined].sum()
        return float((n[defined] * self.auc[defined]).sum() / total) if total > 0 else np.nan


def gauc(scores: np.ndarray, labels: np.ndarray, users: np.ndarray) -> float:
    """AUC per user, averaged over users with both labels by their exposures (Zhou et al. 2018, DIN §4.1)."""
    return UserAuc.of(scores, labels, user_codes(users)).gauc()


def logloss(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean of log(1 + exp(z)) - y·z from logits: exact for any finite logit, nothing is clipped."""
    return ordered_mean(row_logloss(scores, labels))


def row_logloss(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """[N] log loss of each row, in double precision."""
    _refuse_nan(scores)
    z = scores.astype(np.float64)
    return np.logaddexp(0.0, z) - labels * z


@dataclass(frozen=True)
class Reliability:
    """Bins of equal mass over the predicted probability, for calibration plots.

    bin        [N] the bin of each row
    predicted  [bins] mean probability; observed [bins] label rate; rows [bins]; empty bins are left out
    """

    bin: np.ndarray
    predicted: np.ndarray
    observed: np.ndarray
    rows: np.ndarray


def reliability(scores: np.ndarray, labels: np.ndarray, bins: int = 20) -> Reliability:
    """Cut rows into `bins` bins of equal mass by probability; equal probabilities share a bin."""
    probability = sigmoid(scores)
    ranked = np.sort(probability)
    edges = np.unique(ranked[[len(ranked) * b // bins for b in range(1, bins)]]) if len(ranked) else ranked
    of_row = np.searchsorted(edges, probability, side="right")
    used, of_row = np.unique(of_row, return_inverse=True)
    rows = np.bincount(of_row, minlength=len(used))
    starts = np.cumsum(rows) - rows
    predicted = np.add.reduceat(ranked, starts) / rows if len(rows) else ranked
    return Reliability(of_row, predicted, np.bincount(of_row, labels, len(used)) / rows, rows)


def expected_calibration_error(scores: np.ndarray, labels: np.ndarray, bins: int = 20) -> float:
    """Mean over bins of equal mass, weighed by rows, of |mean prediction - label rate|.

    (Naeini et al. 2015, AAAI; equal mass as in Nguyen & O'Connor 2015, arXiv 1508.05154.)
    """
    table = reliability(scores, labels, bins)
    total = table.rows.sum()
    gap = np.abs(table.predicted - table.observed)
    return float((table.rows * gap).sum() / total) if total else np.nan


@dataclass(frozen=True)
class RankingState:
    """Scored rows. Workers score their share; merged states give the very same metrics as one worker's.

    scores  [N] logits; labels [N] 0/1; users [N] any one dtype that sorts
    """

    scores: np.ndarray
    labels: np.ndarray
    users: np.ndarray

    def merge(self, *others: Self) -> Self:
        """All rows of this and the others."""
        states = (self, *others)
        return type(self)(
            np.concatenate([s.scores for s in states]),
            np.concatenate([s.labels for s in states]),
            np.concatenate([s.users for s in states]),
        )

    def ordered(self) -> Self:
        """The same rows in an order that follows from themselves, whoever scored them when."""
        rows = np.lexsort((self.users, self.labels, self.scores))
        return type(self)(self.scores[rows], self.labels[rows], self.users[rows])

    def compute(self) -> dict[str, float]:
        """auc, gauc, logloss, ece, predicted_over_observed (1 is unbiased), rows, positives, users."""
        positives = int((self.labels > 0).sum())
        predicted = float(np.sort(sigmoid(self.scores)).sum())
        return {
            "auc": auc(self.scores, self.labels),
            "gauc": gauc(self.scores, self.labels, self.users),
            "logloss": logloss(self.scores, self.labels),
            "ece": expected_calibration_error(self.scores, self.labels),
            "predicted_over_observed": predicted / positives if positives else np.nan,
            "rows": len(self.scores),
            "positives": positives,
            "users": len(np.unique(self.users)),
        }


def user_codes(users: np.ndarray) -> np.ndarray:
    """[N] 0..U-1 for any ids, in sorted order of the ids."""
    return np.unique(users, return_inverse=True)[1]


def sigmoid(scores: np.ndarray) -> np.ndarray:
    """Probabilities of logits, in double precision, without overflow."""
    return np.exp(-np.logaddexp(0.0, -scores.astype(np.float64)))


def ordered_mean(values: np.ndarray) -> float:
    """Mean that does not depend on the order of `values`; NaN of none."""
    return float(np.sort(values).sum() / len(values)) if len(values) else np.nan


def _runs(*sorted_keys: np.ndarray) -> np.ndarray:
    """[N] 0, 1, 2, …: the run of equal keys that each row is in."""
    starts = np.zeros(len(sorted_keys[0]), bool)
    for key in sorted_keys:
        starts[1:] |= key[1:] != key[:-1]
    return np.cumsum(starts)


def _refuse_nan(scores: np.ndarray) -> None:
    bad = int(np.isnan(scores).sum())
    if bad:
        raise DataError(f"{bad} of {len(scores)} scores are NaN: a metric of them would mean nothing")
