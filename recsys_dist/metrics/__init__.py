"""Metrics in plain NumPy: exact whatever the number of workers, because states merge and sums are ordered."""

from recsys_dist.metrics.bootstrap import intervals, ranking_replicates, retrieval_replicates
from recsys_dist.metrics.ranking import (
    RankingState,
    auc,
    expected_calibration_error,
    gauc,
    logloss,
    reliability,
)
from recsys_dist.metrics.retrieval import RetrievalState

LESS_IS_BETTER = ("logloss", "mae")

__all__ = [
    "LESS_IS_BETTER",
    "RankingState",
    "RetrievalState",
    "auc",
    "expected_calibration_error",
    "gauc",
    "intervals",
    "logloss",
    "ranking_replicates",
    "reliability",
    "retrieval_replicates",
]
