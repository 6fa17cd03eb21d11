"""What a replica keeps loaded, and what it does before its first request."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from ray.serve.exceptions import RayServeException

from recsys_dist.bundle import Bundle
from recsys_dist.serve.deployments import _KEPT, Bundles, ServiceReplica
from recsys_dist.serve.pointer import Pointer


def test_the_bundle_that_is_asked_for_stays_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def of(bundle: Bundle) -> str:
        loaded.append(str(bundle))
        return str(bundle)

    monkeypatch.setattr(Bundle, "open", lambda path: path)
    bundles = Bundles(of)

    async def ask() -> None:
        for trial in range(2 * _KEPT):
            assert await bundles.ready("current") == "current"
            await bundles.ready(f"trial {trial}")

    asyncio.run(ask())
    assert loaded.count("current") == 1 and len(loaded) == 1 + 2 * _KEPT


class Unreachable:
    """A stage's handle; keeps how often it was called, and gives nothing."""

    def __init__(self) -> None:
        self.calls = 0

    async def remote(self, *_: object) -> None:
        self.calls += 1
        raise RayServeException("no replica")


def test_every_stage_is_called_once_before_the_first_request(bundle: Bundle, tmp_path: Path) -> None:
    Pointer(str(bundle.path)).write(tmp_path)
    recall, ranking = Unreachable(), Unreachable()
    own: Any = ServiceReplica.__mro__[1]  # what Ray Serve's decorator made into an ASGI application
    replica = own({"bundle": str(bundle.path), "state": str(tmp_path)}, recall, ranking, None)
    assert recall.calls == ranking.calls == 0
    for _ in range(2):
        asyncio.run(replica.check_health())
    assert recall.calls == ranking.calls == 1
