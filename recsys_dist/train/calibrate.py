"""Fits the calibration of a ranker's probabilities on rows that it was not trained on.

N rows, K knots
"""

from typing import Literal

import numpy as np
import scipy  # whose parts load as they are first used: a worker that starts can do without them

from recsys_dist.models.calibration import KNOTS, Points

Kind = Literal["none", "platt", "isotonic"]


def fit(kind: Kind, logits: np.ndarray, labels: np.ndarray) -> Points:
    """Points of the map that makes probabilities of `logits` [N] fit 0/1 `labels` [N].

    platt     a·z + b by maximum likelihood (Platt 1999); two points
    isotonic  rates that rise with z (Zadrozny & Elkan 2002), through the centres of their blocks, so that
              equal rates do not become equal scores (Oron & Flournoy 2017, arXiv 1701.05964)

    The identity where logits or labels are all alike, or labels do not rise with the logits.
    """
    if kind == "none" or not 0 < labels.mean() < 1 or logits.min() == logits.max():
        return []
    return _platt(logits, labels) if kind == "platt" else _isotonic(logits, labels)


def _platt(logits: np.ndarray, labels: np.ndarray) -> Points:
    z, positive = logits.astype(np.float64), labels > 0
    # Platt's targets, not 0 and 1: rows that a threshold separates would have an infinite slope
    y = np.where(positive, 1 - 1 / (positive.sum() + 2), 1 / ((~positive).sum() + 2))

    def loss(line: np.ndarray) -> tuple[float, np.ndarray]:
        scaled = line[0] * z + line[1]
        excess = scipy.special.expit(scaled) - y
        return float((np.logaddexp(0, scaled) - y * scaled).mean()), np.array(
            [(excess * z).mean(), excess.mean()]
        )

    slope, intercept = scipy.optimize.minimize(
        loss, np.array([1.0, 0.0]), jac=True, method="BFGS", options={"gtol": 1e-8}
    ).x.tolist()
    if slope <= 0:
        return []
    ends = float(logits.min()), float(logits.max())
    return [[z, slope * z + intercept] for z in ends]


def _isotonic(logits: np.ndarray, labels: np.ndarray) -> Points:
    order = np.argsort(logits, kind="stable")
    ascending = logits[order]
    # equal logits are in one bin, that of the first of them
    first = np.searchsorted(ascending, ascending)
    bins = np.unique(first * min(KNOTS, len(order)) // len(order), return_inverse=True)[1]
    rows = np.bincount(bins).astype(np.float64)
    x = np.bincount(bins, ascending) / rows
    # a rate of 0 or 1 has no logit: half a row is given to either side
    rate = (np.bincount(bins, labels[order]) + 0.5) / (rows + 1)
    rising = scipy.optimize.isotonic_regression(rate, weights=rows).x
    block = np.r_[0, np.cumsum(np.diff(rising) > 0)]
    weight = np.bincount(block, rows)
    centre = np.bincount(block, x * rows) / weight
    height = rising[np.r_[0, np.flatnonzero(np.diff(block)) + 1]]
    if len(centre) < 2 or not (np.diff(centre) > 0).all():
        return []
    points: Points = np.stack([centre, np.log(height / (1 - height))], axis=1).tolist()
    return points
