"""The service over HTTP: FastAPI routes, the same with Ray Serve and in a single process without Ray."""

import json
import logging
from typing import Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError

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
from recsys_dist.serve.guard import Guard, Limits

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
    app = FastAPI(title="recsys_dist", version=recsys_dist.__version__, description=__doc__)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(InvalidError, _refused)
    app.add_exception_handler(StateError, _not_stored)
    _routes(app, service)
    return Guard(app, limits or Limits(), token)


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
    problems = [
        {"field": ".".join(str(part) for part in problem["loc"][1:]) or "body", "problem": problem["msg"]}
        if problem["type"] != "json_invalid"
        else {"field": "body", "problem": "is not JSON"}
        for problem in error.errors()
    ]
    return Response(json.dumps({"detail": problems}), 422, media_type="application/json")


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, InvalidError)
    return Response(json.dumps({"detail": error.problems}), 422, media_type="application/json")


async def _not_stored(_: Request, error: Exception) -> Response:
    """Only /events gets here: answers do without a state that fails."""
    log.error("events were refused: %s", error)
    detail = "the users' state does not answer, so the events are not stored; send them again in a second"
    return Response(json.dumps({"detail": detail}), 503, {"retry-after": "1"}, media_type="application/json")
