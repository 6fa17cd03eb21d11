"""The service over HTTP: FastAPI routes, the same with Ray Serve and in a single process without Ray.

What is asked for most does not go through FastAPI where nothing is wrong with it: see Direct.
"""

import json
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError

import recsys_dist
from recsys_dist.errors import StateError
from recsys_dist.serve.api import (
    Answer,
    EventsAnswer,
    EventsRequest,
    Health,
    InvalidError,
    RankRequest,
    RecallRequest,
    RecommendRequest,
    Version,
)
from recsys_dist.serve.guard import App, Guard, Limits, Receive, Replay, Scope, Send

log = logging.getLogger(__name__)


class Service(Protocol):
    """What answers; every method may be called concurrently."""

    async def recommend(self, request: RecommendRequest) -> Answer: ...

    async def recall(self, request: RecallRequest) -> Answer: ...

    async def rank(self, request: RankRequest) -> Answer: ...

    async def record(self, request: EventsRequest) -> EventsAnswer: ...

    def version(self) -> Version: ...


def create_app(service: Service, limits: Limits | None = None, token: str | None = None) -> Guard:
    """An ASGI application; OpenAPI at /openapi.json, and to try by hand at /docs."""
    app = FastAPI(title="recsys_dist", version=recsys_dist.__version__)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(InvalidError, _refused)
    app.add_exception_handler(StateError, _not_stored)
    _routes(app, service)
    return Guard(Direct(app, service), limits or Limits(), token)


class Direct:
    """ASGI middleware: a valid POST to /recommend, /recall or /rank is answered from bytes to bytes.

    FastAPI describes these routes and answers all else, what is wrong with a request among it. Its own way
    through a valid one would take the ingress more time than all else that it does with it.
    """

    def __init__(self, app: App, service: Service) -> None:
        self.app = app
        self._routes: dict[str, tuple[Any, Callable[[Any], Awaitable[Answer]]]] = {
            "/recommend": (RecommendRequest, service.recommend),
            "/recall": (RecallRequest, service.recall),
            "/rank": (RankRequest, service.rank),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in self._routes:
            await self.app(scope, receive, send)
            return
        asked, answer = self._routes[scope["path"]]
        body = (await receive()).get("body", b"")  # the Guard's, so it is whole
        try:
            found = (await answer(asked.model_validate_json(body))).model_dump_json().encode()
        except (ValidationError, InvalidError):  # told by FastAPI, whatever type the client gave its JSON
            others = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
            typed = {**scope, "headers": [*others, (b"content-type", b"application/json")]}
            await self.app(typed, Replay(body, receive), send)
            return
        about = [(b"content-type", b"application/json"), (b"content-length", str(len(found)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": about})
        await send({"type": "http.response.body", "body": found})


def _routes(app: FastAPI, service: Service) -> None:
    @app.post("/recommend", response_model=Answer)
    async def recommend(request: RecommendRequest) -> Response:
        """Items for a user: recall, then ranking."""
        return _json(await service.recommend(request))

    @app.post("/recall", response_model=Answer)
    async def recall(request: RecallRequest) -> Response:
        """The nearest items of a user."""
        return _json(await service.recall(request))

    @app.post("/rank", response_model=Answer)
    async def rank(request: RankRequest) -> Response:
        """The given items, most probable first."""
        return _json(await service.rank(request))

    @app.post("/events")
    async def events(request: EventsRequest) -> EventsAnswer:
        """What users did: counts from their next request on. Outcomes that are not named did not happen."""
        return await service.record(request)

    @app.get("/healthz")
    async def healthz() -> Health:
        return Health(status="ok")

    @app.get("/version")
    async def version() -> Version:
        return service.version()


def _json(answer: Answer) -> Response:
    """Straight to bytes: the answer is valid by construction."""
    return Response(answer.model_dump_json(), media_type="application/json")


async def _invalid(_: Request, error: Exception) -> Response:
    """422 that names each wrong field and the reason, and does not repeat what was sent."""
    assert isinstance(error, RequestValidationError)
    found: dict[str, list[str]] = {}  # a value that may be of several types has a problem with each
    for problem in error.errors():
        not_json = problem["type"] == "json_invalid"
        field = "body" if not_json else _field(problem["loc"][1:], error.body)
        found.setdefault(field, []).append("is not JSON" if not_json else problem["msg"])
    problems = [{"field": field, "problem": " or ".join(said)} for field, said in found.items()]
    return Response(json.dumps({"detail": problems}), 422, media_type="application/json")


def _field(where: tuple[str | int, ...], body: Any) -> str:
    """The path of what is wrong or missing in a request, without pydantic's names of types it may be of."""
    named = []
    for part in where:
        if isinstance(body, dict):
            body = body.get(part)
        elif isinstance(body, list) and isinstance(part, int):
            body = body[part]
        else:
            break
        named.append(str(part))
    return ".".join(named) or "body"


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, InvalidError)
    return Response(json.dumps({"detail": error.problems}), 422, media_type="application/json")


async def _not_stored(_: Request, error: Exception) -> Response:
    """Only /events gets here: answers do without a state that fails.

    No 503, which the proxy takes for a dead replica's: it would send the events again, to be stored twice.
    """
    log.error("events were refused: %s", error)
    detail = "the users' state does not answer, so the events may not be stored; send them again in a second"
    return Response(json.dumps({"detail": detail}), 504, {"retry-after": "1"}, media_type="application/json")
