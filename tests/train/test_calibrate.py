"""Calibration: fitted maps make probabilities right, change no order, and pass through their points."""

import numpy as np
import pytest
import torch
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from recsys_dist.config import rng_for
from recsys_dist.metrics import expected_calibration_error, logloss
from recsys_dist.models.calibration import KNOTS, Calibration
from recsys_dist.train.calibrate import Kind, fit

ROWS = 20_000


def rows(seed: int, curve: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are twice too sure and biased (and, with `curve`, bent), and their labels."""
    rng = rng_for(seed, "calibration")
    true = rng.normal(size=ROWS)
    labels = (rng.random(ROWS) < 1 / (1 + np.exp(-true))).astype(np.float32)
    return (np.sinh(true) if curve else 2 * true + 1).astype(np.float32), labels


def mapped(points: list, logits: np.ndarray) -> np.ndarray:
    calibration = Calibration()
    calibration.set(points)
    return calibration(torch.from_numpy(logits)).numpy()


def test_platt_is_logistic_regression_of_the_logit() -> None:
    logits, labels = rows(0)
    line = LogisticRegression(C=np.inf, tol=1e-10).fit(logits[:, None].astype(np.float64), labels)
    expected = line.coef_[0, 0] * logits + line.intercept_[0]
    np.testing.assert_allclose(mapped(fit("platt", logits, labels), logits), expected, atol=2e-3)
    assert line.coef_[0, 0] == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(("kind", "curve"), [("platt", False), ("isotonic", False), ("isotonic", True)])
def test_probabilities_of_other_rows_come_right_and_keep_their_order(kind: Kind, curve: bool) -> None:
    points = fit(kind, *rows(1, curve))
    logits, labels = rows(2, curve)
    found = mapped(points, logits)
    assert logloss(found, labels) < logloss(logits, labels) - 0.01
    assert expected_calibration_error(found, labels) < 0.02 < expected_calibration_error(logits, labels)
    spread = np.sort(logits)[:: ROWS // 500].astype(np.float64)
    assert (np.diff(mapped(points, spread)) > 0).all()


def test_isotonic_rates_are_those_of_the_pooled_bins() -> None:
    logits, labels = rows(3, curve=True)
    points = np.array(fit("isotonic", logits, labels))
    bins = np.array_split(np.argsort(logits, kind="stable"), KNOTS)
    centres = np.array([logits[b].mean() for b in bins])
    rates = np.array([(labels[b].sum() + 0.5) / (len(b) + 1) for b in bins])
    lengths = [len(b) for b in bins]
    pooled = IsotonicRegression().fit(centres, rates, lengths).predict(centres)
    np.testing.assert_allclose(1 / (1 + np.exp(-points[:, 1])), np.unique(pooled), rtol=1e-6)


def test_a_map_goes_through_its_points_and_on_with_slope_one() -> None:
    logits = np.array([-3.0, 0.0, 0.5, 1.0, 2.0, 4.0])
    np.testing.assert_allclose(mapped([[0, 1], [1, 5], [2, 6]], logits), [-2, 1, 3, 5, 6, 8])
    np.testing.assert_allclose(mapped([], logits), logits)


def test_what_cannot_be_fitted_changes_nothing() -> None:
    logits, labels = rows(4)
    assert fit("none", logits, labels) == fit("platt", logits, np.ones(ROWS)) == []
    assert fit("platt", -logits, labels) == fit("isotonic", -logits, labels) == []


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
def test_a_few_rows_that_a_threshold_separates_have_a_finite_map(kind: Kind) -> None:
    points = np.array(fit(kind, np.array([0.5, 0.1, 0.3, -2.0], np.float32), np.array([1.0, 0, 1, 0])))
    assert points.shape[1] == 2 and np.isfinite(points).all() and np.abs(points).max() < 20


@pytest.mark.parametrize("kind", ["platt", "isotonic"])
@pytest.mark.parametrize("logit", [0.0, 0.1])
def test_equal_logits_stay_what_they_are(kind: Kind, logit: float) -> None:
    """Two points at one place have no slope between them."""
    logits, labels = np.full(ROWS, logit, np.float32), (np.arange(ROWS) > ROWS // 2).astype(np.float32)
    np.testing.assert_array_equal(mapped(fit(kind, logits, labels), logits), logits)


@pytest.mark.parametrize("distinct", [2, 3, 10])
def test_isotonic_of_few_distinct_logits_has_a_point_for_each(distinct: int) -> None:
    rng = rng_for(distinct, "ties")
    at = rng.integers(0, distinct, ROWS)
    rate = (1 + at) / (distinct + 2)
    labels = (rng.random(ROWS) < rate).astype(np.float32)
    points = np.array(fit("isotonic", at.astype(np.float32), labels))
    np.testing.assert_array_equal(points[:, 0], np.arange(distinct))
    of_logit = np.bincount(at, labels) / np.bincount(at)
    np.testing.assert_allclose(1 / (1 + np.exp(-points[:, 1])), of_logit, atol=1e-3)
