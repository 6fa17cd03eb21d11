"""Fixtures that several directories of tests share: made once, read by all, changed by none."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# an example that takes long says that the machine is busy
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


@dataclass(frozen=True)
class Pair:
    """The small log prepared, two models trained on it (task -> checkpoint), and what they are worth."""

    prepared: Any
    checkpoints: dict[str, Path]
    evaluations: dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    from tests import bundles  # imports torch, which most tests of other things need not wait for

    root = tmp_path_factory.mktemp("pair")
    prepared = bundles.prepare(root / "data")
    checkpoints = bundles.train(prepared, root / "models")
    return Pair(prepared, checkpoints, bundles.evaluations(prepared, checkpoints))


@pytest.fixture(scope="session")
def bundle(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The pair exported: a `recsys_dist.bundle.Bundle`, its files at `bundle.path`."""
    from recsys_dist.export import export

    return export(pair.prepared, pair.checkpoints, pair.evaluations, tmp_path_factory.mktemp("bundles"))
