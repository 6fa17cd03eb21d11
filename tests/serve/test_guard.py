"""Clients that take their time, seen from the guard. (The rest of it, over HTTP: test_http.)"""

import asyncio
from typing import Any

import pytest

from recsys_dist.serve import guard
from recsys_dist.serve.guard import Guard, Limits, Message, Receive, Scope, Send


async def answered(_: Scope, __: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def stalled() -> Message:
    await asyncio.Event().wait()
    raise AssertionError


async def whole() -> Message:
    return {"type": "http.request", "body": b"{}"}


def test_a_body_that_does_not_come_locks_nobody_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "_BODY_S", 0.05)
    guarded = Guard(answered, Limits(ongoing=1), "s3cret")

    async def ask(path: str, receive: Receive) -> dict[str, Any]:
        told: list[Message] = []

        async def send(message: Message) -> None:
            told.append(message)

        headers = [] if path == "/healthz" else [(b"authorization", b"Bearer s3cret")]
        await guarded({"type": "http", "path": path, "headers": headers}, receive, send)
        return dict(told[0])

    async def asked() -> list[dict[str, Any]]:
        waiting = asyncio.create_task(ask("/recommend", stalled))
        await asyncio.sleep(0)
        probes = [await ask("/healthz", stalled), await ask("/recommend", whole)]
        return [*probes, await waiting, await ask("/recommend", whole)]

    probe, meanwhile, late, after = asyncio.run(asked())
    assert [one["status"] for one in (probe, meanwhile, late, after)] == [200, 429, 408, 200]
    assert (b"connection", b"close") in late["headers"]
