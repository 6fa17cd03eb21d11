"""What stands before the service: who may ask, how large a body may be, how many ask at once.

All of it is decided before a body is parsed.
"""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/healthz"})  # for probes, which have no token
_BODY_S = 10.0  # for a body to come: a client that sends none takes up one of `ongoing` for so long


@dataclass(frozen=True)
class Limits:
    """body_bytes of one request, `ongoing` requests of one replica; what is over gets a 413 or a 429."""

    body_bytes: int = 1 << 20
    ongoing: int = 256


class Guard:
    """ASGI middleware around `app`. `token`: what `Authorization: Bearer` must say, None for nothing."""

    def __init__(self, app: App, limits: Limits, token: str | None = None) -> None:
        self.app, self.limits, self._token = app, limits, token
        self._ongoing = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:  # a probe is answered however many ask
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if not self._may(headers.get(b"authorization", b"")):
            more = [(b"www-authenticate", b"Bearer")]
            return await _refuse(send, 401, "a bearer token is needed, as in Authorization: Bearer ...", more)
        if self._ongoing >= self.limits.ongoing:
            detail = f"{self._ongoing} requests are being answered already; try again in a second"
            return await _refuse(send, 429, detail, [(b"retry-after", b"1")])
        self._ongoing += 1
        try:
            await self._read(scope, headers.get(b"content-length", b""), receive, send)
        finally:
            self._ongoing -= 1

    def _may(self, authorization: bytes) -> bool:
        return self._token is None or hmac.compare_digest(authorization, f"Bearer {self._token}".encode())

    async def _read(self, scope: Scope, length: bytes, receive: Receive, send: Send) -> None:
        """Hand the request on with its whole body, or refuse it."""
        closing = [(b"connection", b"close")]
        try:
            async with asyncio.timeout(_BODY_S):
                body = await self._body(length, receive)
        except TimeoutError:
            return await _refuse(send, 408, f"the body did not come within {_BODY_S:g} s", closing)
        if body is None:
            return await _refuse(send, 413, f"the body is over {self.limits.body_bytes} bytes", closing)
        return await self.app(scope, Replay(body, receive), send)

    async def _body(self, length: bytes, receive: Receive) -> bytes | None:
        """The whole body, or None as soon as it is known to be too long."""
        if length.isdigit() and int(length) > self.limits.body_bytes:
            return None
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self.limits.body_bytes:
                return None
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                return body


class Replay:
    """Hands a body that was read over once more, then whatever else the client sends."""

    def __init__(self, body: bytes, receive: Receive) -> None:
        self._body: bytes | None = body
        self._receive = receive

    async def __call__(self) -> Message:
        if self._body is None:
            return await self._receive()
        body, self._body = self._body, None
        return {"type": "http.request", "body": body, "more_body": False}


async def _refuse(send: Send, status: int, detail: str, headers: list[tuple[bytes, bytes]]) -> None:
    body = json.dumps({"detail": detail}).encode()
    about = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*about, *headers]})
    await send({"type": "http.response.body", "body": body})
