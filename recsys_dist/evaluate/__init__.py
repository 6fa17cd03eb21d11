"""Held-out days: what a trained model is worth, always beside the baselines it has to beat."""

from recsys_dist.evaluate.exported import evaluate_bundle
from recsys_dist.evaluate.ranking import evaluate_ranking
from recsys_dist.evaluate.recall import evaluate_recall
from recsys_dist.evaluate.trained import EvaluateConfig, Trained, load_trained, write_json

__all__ = [
    "EvaluateConfig",
    "Trained",
    "evaluate_bundle",
    "evaluate_ranking",
    "evaluate_recall",
    "load_trained",
    "write_json",
]
