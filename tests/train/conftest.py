"""Prepared data made by hand, a cluster of two CPUs, and a run, for tests that train through Ray.

All of them share one cluster: to start one takes as long as a test. Nodes that come and go need one of their
own (test_elastic.py), which comes before.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import ray

from recsys_dist import session
from recsys_dist.train import trainer
from tests.train import prepared
from tests.train.runs import config


@dataclass(frozen=True)
class Run:
    """A run by two workers, with the lines of progress that it told."""

    fitted: trainer.FitResult
    lines: list[dict[str, Any]]


@pytest.fixture(scope="package")
def data(tmp_path_factory) -> Path:
    return prepared.make(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="package")
def uninterrupted(data, cluster, tmp_path_factory) -> Run:  # noqa: ARG001
    lines = []
    fitted = trainer.fit(config(data, refit=False), tmp_path_factory.mktemp("run"), on_report=lines.append)
    return Run(fitted, lines)


@pytest.fixture(scope="package")
def cluster():
    session.connect(cpus=2)
    yield
    ray.shutdown()
