"""Runs on the small prepared data, and what came of them."""

from pathlib import Path

import numpy as np

from recsys_dist.train.checkpoint import load_for_inference
from recsys_dist.train.settings import TrainConfig


def config(data: Path, **settings) -> TrainConfig:
    base = {
        "data": str(data),
        "model": {"name": "wide_deep", "embedding_dim": 8, "hidden": [16]},
        "batch_rows": 64,
        "num_workers": 2,
        "epochs": 2,
        "patience": 2,
        "max_failures": 1,
        "optimizer": {"deep": {"lr": 0.3}, "wide": {"lr": 0.3}, "dense": {"lr": 0.01}},
    }
    return TrainConfig.parse({**base, **settings})


def weights(checkpoint: Path) -> dict[str, np.ndarray]:
    model, _ = load_for_inference(checkpoint)
    return {name: value.numpy() for name, value in model.state_dict().items()}


def assert_same(one: Path, other: Path) -> None:
    expected = weights(one)
    for name, value in weights(other).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


def assert_calibrated(checkpoint: Path, entry: dict) -> None:
    """By the map that was fitted on the validation rows of the chosen epoch."""
    found = weights(checkpoint)
    points = np.array(entry["calibration"])
    assert points.shape == (2, 2)
    np.testing.assert_array_equal(
        points, np.stack([found["calibration.x_K"], found["calibration.y_K"]], 1)[:2]
    )
