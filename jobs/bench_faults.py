"""Requests that go on while a replica is killed, a champion swapped, a bad one refused, and rolled back."""

import asyncio
import contextlib
import itertools
import os
import signal
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from jobs.showcase import service
from recsys_dist.bundle import Bundle
from recsys_dist.errors import ServeError
from recsys_dist.registry import Registry, RegistryConfig
from recsys_dist.serve import golden

LEAST_REQUESTS = 5_000  # of a measurement
_POLL_S = 1.0
_WAIT_S = 120.0
_CLIENTS = 8


def measure(
    bundle: Bundle, users: list[str], scratch: Path, least_requests: int = LEAST_REQUESTS
) -> dict[str, Any]:
    """Answers by HTTP status and by bundle, and what each fault led to. Two replicas of everything."""
    uri = f"sqlite:///{scratch / 'registry.db'}"
    registry = Registry(RegistryConfig(uri=uri))
    _crowned(registry, bundle)
    options = [
        f"{stage}.{key}" for stage in ("service", "recall", "ranking") for key in ("replicas=2", "cpus=0.2")
    ]
    arguments = ["--tracking-uri", uri, f"poll_s={_POLL_S}", *options]
    with service(arguments, scratch / "state") as port:
        faults = Faults(registry, bundle, scratch, port)
        return asyncio.run(_under_load(port, users, faults, least_requests))


class Faults:
    """What is done to a running service, one after the other; each waits until it shows."""

    def __init__(self, registry: Registry, bundle: Bundle, scratch: Path, port: int) -> None:
        self._registry, self._bundle, self._scratch, self._port = registry, bundle, scratch, port

    async def all(self, session: aiohttp.ClientSession) -> dict[str, str]:
        """What each came to."""
        other = replace(self._bundle, events=self._bundle.events.slice(1)).save(
            self._scratch / "other", golden.ask
        )
        bad = replace(self._bundle, events=self._bundle.events.slice(2)).save(
            self._scratch / "bad", _tampered
        )
        found = {}
        for stage in ("Ranking", "Recall", "Service"):
            found[f"{stage} replica killed"] = await self._kill(stage)
        found["new champion"] = await self._becomes(session, self._crown(other), other.manifest.version)
        found["bad champion"] = await self._refuses(session, self._crown(bad))
        found["rollback"] = await self._becomes(session, self._back, other.manifest.version)
        return found

    async def _kill(self, stage: str) -> str:
        before = _replicas(stage)
        os.kill(min(before), signal.SIGKILL)

        async def replaced() -> bool:
            return bool(_replicas(stage) - before)

        await _until(replaced, f"a new replica of {stage}")
        return "replaced"

    def _crown(self, bundle: Bundle) -> Callable[[], None]:
        return partial(_crowned, self._registry, bundle)

    def _back(self) -> None:
        self._registry.rollback()

    async def _becomes(self, session: aiohttp.ClientSession, change: Callable[[], None], version: str) -> str:
        await asyncio.to_thread(change)

        async def there() -> bool:
            found = await self._version(session)
            return bool(found["bundle"] == version and found["refused"] is None)

        await _until(there, f"bundle {version}")
        return f"serves {version}"

    async def _refuses(self, session: aiohttp.ClientSession, change: Callable[[], None]) -> str:
        await asyncio.to_thread(change)

        async def refused() -> bool:
            return bool((await self._version(session))["refused"])

        await _until(refused, "the refusal")
        found = await self._version(session)
        return f"refused, still serves {found['bundle']}: {found['refused']}"

    async def _version(self, session: aiohttp.ClientSession) -> dict[str, Any]:
        async with session.get(f"http://127.0.0.1:{self._port}/version") as response:
            found: dict[str, Any] = await response.json()
            return found


async def _under_load(port: int, users: list[str], faults: Faults, least_requests: int) -> dict[str, Any]:
    statuses, bundles, degraded = Counter[str](), Counter[str](), Counter[str]()
    asked, done = itertools.cycle(users), asyncio.Event()

    async def client(session: aiohttp.ClientSession) -> None:
        while not done.is_set() or statuses.total() < least_requests:
            try:
                body = {"user_id": next(asked)}
                async with session.post(f"http://127.0.0.1:{port}/recommend", json=body) as response:
                    statuses[str(response.status)] += 1
                    if response.status == 200:
                        answer = await response.json()
                        bundles[answer["bundle"]] += 1
                        degraded.update(r for r in answer["degraded"] if r.startswith(("recall", "ranking")))
            except aiohttp.ClientError as error:
                statuses[type(error).__name__] += 1

    async with aiohttp.ClientSession() as session:
        clients = [asyncio.create_task(client(session)) for _ in range(_CLIENTS)]
        try:
            found = await faults.all(session)
        finally:
            done.set()
            await asyncio.gather(*clients)
    failed = statuses.total() - statuses["200"]
    return {
        "requests": statuses.total(),
        "failed": failed,
        "statuses": dict(statuses),
        "bundles": dict(bundles),
        "degraded": dict(degraded),
        "faults": found,
    }


def table(found: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"{found['requests']:,} requests, {found['failed']} failed (required 0): {found['statuses']}"]
    lines += [f"answered from bundles {found['bundles']}; without a stage: {found['degraded'] or 'none'}"]
    return "\n".join([*lines, *(f"  {fault}: {outcome}" for fault, outcome in found["faults"].items())])


def _crowned(registry: Registry, bundle: Bundle) -> None:
    registry.publish(bundle.path)
    registry.promote(bundle.manifest.version)  # whatever its gates said


def _replicas(of: str = "ServeReplica") -> set[int]:
    """Process ids of replicas, of one deployment or all, that descend from this process."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile, or a zombie
            title = " ".join(process.cmdline())
            if "ServeReplica" in title and of in title:
                found.add(process.pid)
    return found


def _tampered(bundle: Bundle) -> list[dict[str, Any]]:
    cases = golden.ask(bundle)
    for item in cases[0]["answer"]:
        item["probability"] = 0.5 * (item["probability"] or 0)
    return cases


async def _until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    try:
        async with asyncio.timeout(_WAIT_S):
            while not await condition():
                await asyncio.sleep(0.5)
    except TimeoutError:
        raise ServeError(f"after {_WAIT_S:.0f} s the service does not show {what}") from None
