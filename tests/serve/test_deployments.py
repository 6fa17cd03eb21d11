"""What a replica keeps loaded."""

import asyncio

import pytest

from recsys_dist.bundle import Bundle
from recsys_dist.serve.deployments import _KEPT, Bundles


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
