"""Prepared data made by hand, and a cluster of two CPUs, for tests that train through Ray."""

from pathlib import Path

import pytest
import ray

from tests.train import prepared


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return prepared.make(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield
    ray.shutdown()
