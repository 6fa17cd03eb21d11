"""Metrics of predicted amounts, as watch time: mean absolute error and XAUC.

N rows
"""

import numpy as np
import scipy  # whose statistics load where they are first used, for they take a second

from recsys_dist.errors import DataError


def amount_metrics(predicted: np.ndarray, observed: np.ndarray) -> dict[str, float]:
    """`mae`, in the amount's unit, and `xauc` of predictions [N] for observed amounts [N]; NaN of no rows.

    XAUC (Zhan et al. 2022, KDD, arXiv 2206.06003, §4.1.2) is the share of pairs of rows with different
    amounts that the predictions put in the right order; equal predictions count half.
    DataError for a prediction that is not finite.
    """
    if not np.isfinite(predicted).all():
        raise DataError(
            f"{int((~np.isfinite(predicted)).sum())} of {len(predicted)} predictions are not finite"
        )
    if not len(observed):
        return {"mae": np.nan, "xauc": np.nan}
    mae = float(np.abs(predicted.astype(np.float64) - observed).mean())
    return {"mae": mae, "xauc": _xauc(predicted, observed)}


def _xauc(predicted: np.ndarray, observed: np.ndarray) -> float:
    """From Kendall's tau-b = (C - D) / √(p·o), C right and D wrong pairs, p and o those not tied in each."""
    untied = [_untied_pairs(values) for values in (predicted, observed)]
    if not all(untied):
        return 0.5 if untied[1] else np.nan
    tau = float(scipy.stats.kendalltau(predicted, observed).statistic)
    return 0.5 + 0.5 * tau * float(np.sqrt(untied[0] / untied[1]))


def _untied_pairs(values: np.ndarray) -> float:
    equal = np.unique(values, return_counts=True)[1].astype(np.float64)
    rows = float(len(values))
    return rows * (rows - 1) / 2 - float((equal * (equal - 1) / 2).sum())
