"""Errors and order of predicted amounts, against all pairs counted one by one."""

import numpy as np
import pytest

from recsys_dist.config import rng_for
from recsys_dist.errors import DataError
from recsys_dist.metrics.amounts import amount_metrics


def by_pairs(predicted: np.ndarray, observed: np.ndarray) -> float:
    right = total = 0.0
    for i in range(len(observed)):
        for j in range(len(observed)):
            if observed[i] > observed[j]:
                total += 1
                right += (predicted[i] > predicted[j]) + 0.5 * (predicted[i] == predicted[j])
    return right / total


def test_xauc_is_the_share_of_ordered_pairs_ties_half() -> None:
    rng = rng_for(0, "amounts")
    for levels in (3, 1000):
        predicted, observed = rng.integers(0, levels, (2, 60)).astype(float)
        found = amount_metrics(predicted, observed)
        assert found["xauc"] == pytest.approx(by_pairs(predicted, observed), abs=1e-12)
        assert found["mae"] == pytest.approx(
            np.mean([abs(p - o) for p, o in zip(predicted, observed, strict=True)])
        )


def test_what_has_no_order_has_no_xauc() -> None:
    assert np.isnan(amount_metrics(np.arange(3.0), np.ones(3))["xauc"])
    assert amount_metrics(np.ones(3), np.arange(3.0))["xauc"] == 0.5
    assert np.isnan(amount_metrics(np.empty(0), np.empty(0))["mae"])


def test_a_prediction_that_is_not_finite_is_refused() -> None:
    with pytest.raises(DataError, match="1 of 2 predictions"):
        amount_metrics(np.array([1.0, np.inf]), np.ones(2))
