"""The Ray Serve deployments: Recall, Ranking, and before them the Service that speaks HTTP.

A request is answered by one bundle from end to end: the Service names the bundle in every call, and a
stage that has not loaded it yet loads it then. A new bundle is loaded in the background by every replica
(`load`), and only then taken by the Service (`take`), so that no request waits for it.
"""

import asyncio
import contextlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from recsys_dist import cpu
from recsys_dist.bundle import Bundle
from recsys_dist.config import Config
from recsys_dist.errors import ConfigError
from recsys_dist.serve import golden
from recsys_dist.serve.api import (
    Answer,
    EventsAnswer,
    EventsRequest,
    RankRequest,
    RecallRequest,
    RecommendRequest,
    Version,
)
from recsys_dist.serve.batcher import Batcher
from recsys_dist.serve.guard import Guard, Limits
from recsys_dist.serve.http import create_app
from recsys_dist.serve.local import LocalService
from recsys_dist.serve.pointer import Pointer
from recsys_dist.serve.rank import Rank
from recsys_dist.serve.recall import Recall
from recsys_dist.serve.recommend import StageError
from recsys_dist.serve.state import canonical_schema, open_state
from recsys_dist.serve.telemetry import Telemetry

T = TypeVar("T")
_WARM_UP_MS = 30_000.0  # for stages that are just starting, too
_KEPT = 3  # bundles a replica holds: the current one, the former for requests on their way, one on trial


class StageConfig(Config):
    """How many replicas a deployment has and what each may use."""

    replicas: int = Field(1, ge=1)
    cpus: float = Field(0.5, ge=0, description="CPUs that each replica reserves")
    threads: int = Field(1, ge=1, description="threads of one replica's arithmetic")
    ongoing: int = Field(16, ge=1, description="batches that a replica may have at once; the rest waits")
    queued: int = Field(
        64, ge=1, description="batches that may wait; the rest is refused, and answered without"
    )


class ServiceConfig(Config):
    """Everything that `recsys_dist.serve.app:build` takes."""

    bundle: str | None = Field(None, description="directory of a bundle to serve, come what may")
    registry: str | None = Field(None, description="MLflow's URI: serve what `alias` stands for there")
    model: str = Field("recsys_dist", description="name of the registered model")
    alias: str = "champion"
    state: str = Field("runs/serving", description="directory for new events and all that replicas share")
    state_url: str | None = Field(
        None,
        description="redis://, rediss://, valkey:// or unix:// server of users' new events, or env:NAME of a "
        "variable that holds it, password and all; none: `state`",
    )
    poll_s: float = Field(10.0, gt=0, description="how often the registry is asked for a new champion")
    budget_ms: float = Field(200.0, gt=0, description="time for an answer; what is not ready is left out")
    batch_rows: int = Field(32, ge=1, description="requests that travel between deployments in one call")
    concurrent_batches: int = Field(2, ge=1, description="batches on their way at once; the rest gathers")
    ongoing: int = Field(256, ge=1, description="requests at once in a replica of the Service; more get 429")
    body_bytes: int = Field(1 << 20, ge=1024)
    token_file: str | None = Field(None, description="file with the bearer token that clients must send")
    service: StageConfig = StageConfig()
    recall: StageConfig = StageConfig()
    ranking: StageConfig = StageConfig()

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.bundle is None) == (self.registry is None):
            raise ValueError("name a bundle's directory or a registry, one of them")
        return self

    def token(self) -> str | None:
        """The bearer token, which is in a file so that no dashboard shows it; ConfigError where it cannot."""
        if self.token_file is None:
            return None
        try:
            found = Path(self.token_file).read_text().strip()
        except OSError as error:
            raise ConfigError(f"token_file {self.token_file!r} cannot be read: {error.strerror}") from None
        if not found:
            raise ConfigError(f"token_file {self.token_file!r} is empty; write a long random token into it")
        return found


class Bundles(Generic[T]):
    """The bundles that a replica used last, each as what `of` makes of it; loads every one once."""

    def __init__(self, of: Callable[[Bundle], T]) -> None:
        self._of = of
        self._lock = threading.Lock()
        self._held: OrderedDict[str, T] = OrderedDict()

    def get(self, path: str) -> T:
        """Blocks while it is loaded the first time; BundleError where it is not whole."""
        with self._lock:
            if path not in self._held:
                self._held[path] = self._of(Bundle.open(path))
            self._held.move_to_end(path)
            while len(self._held) > _KEPT:
                self._held.popitem(last=False)
            return self._held[path]

    async def ready(self, path: str) -> T:
        """The same without holding up the event loop."""
        found = self._held.get(path)
        if found is None:
            return await asyncio.to_thread(self.get, path)
        with contextlib.suppress(KeyError):  # evicted this moment
            self._held.move_to_end(path)
        return found


def _checked(of: Callable[[Bundle], T]) -> Callable[[Bundle], T]:
    """With the golden requests replayed first: a replica that would answer otherwise never answers."""

    def opened(bundle: Bundle) -> T:
        golden.replay(bundle)
        return of(bundle)

    return opened


class Stage(Generic[T]):
    """A model behind Ray Serve: `of` is what a bundle is made into, `threads` what its arithmetic may use."""

    def __init__(self, of: Callable[[Bundle], T], state: str, threads: int) -> None:
        cpu.configure(threads)
        self._bundles = Bundles(_checked(of))
        self._bundles.get(_served(state))

    async def load(self, path: str) -> None:
        await self._bundles.ready(path)


class RecallStage(Stage[Recall]):
    """User vectors and the nearest items, for a batch of requests."""

    def __init__(self, state: str, threads: int) -> None:
        super().__init__(Recall.of, state, threads)

    async def __call__(
        self, path: str, users: bytes, k: int, excluded: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        stage = await self._bundles.ready(path)
        return stage.retrieve(_from_ipc(users), k, excluded)


class RankStage(Stage[Rank]):
    """Probabilities of all candidates of a batch of requests."""

    def __init__(self, state: str, threads: int) -> None:
        super().__init__(Rank.of, state, threads)

    async def __call__(self, path: str, users: bytes, of: np.ndarray, positions: np.ndarray) -> np.ndarray:
        stage = await self._bundles.ready(path)
        return stage.predictions(_from_ipc(users), of, positions)


class Remote:
    """Both stages behind Ray Serve, for the requests of one bundle."""

    def __init__(self, bundle: Bundle, recall: DeploymentHandle, ranking: DeploymentHandle) -> None:
        self._path = str(bundle.path)
        self._recall, self._ranking = recall, ranking
        self._columns = {
            "recall": _user_side(bundle.recall.schema),
            "ranking": _user_side(bundle.ranking.schema),
        }

    async def recall(
        self, users: pa.Table, k: int, excluded: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        return await _called(
            self._recall.remote(self._path, _to_ipc(users, self._columns["recall"]), k, excluded)
        )

    async def rank(self, users: pa.Table, of: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return await _called(
            self._ranking.remote(self._path, _to_ipc(users, self._columns["ranking"]), of, positions)
        )


@serve.ingress()
class ServiceReplica:
    """Speaks HTTP, computes the users' features, and asks the stages, many requests in one call."""

    def __init__(
        self, cfg: dict[str, Any], recall: DeploymentHandle, ranking: DeploymentHandle, _: DeploymentHandle
    ) -> None:
        cpu.configure(1)
        self.cfg = ServiceConfig.parse(cfg)
        self._handles = recall, ranking
        self._bundles = Bundles(_checked(self._opened))
        self._telemetry = Telemetry()
        self._use(self._bundles.get(_served(self.cfg.state)))
        self._together = Batcher(self._recommended, self.cfg.batch_rows, self.cfg.concurrent_batches)
        self._warm = False

    async def check_health(self) -> None:
        """Called by Ray Serve before the first request, and every few seconds from then on.

        The first call to a stage connects to it, which can take longer than an answer may. A replica that was
        just starting when all were told of another bundle learns of it here.
        """
        current = Path(_served(self.cfg.state))
        if current != self._service.recommender.bundle.path:
            await self.take(str(current))
        if not self._warm:
            self._warm = True
            recommender = self._service.recommender
            await recommender.recommend(golden.requests(recommender.bundle), _WARM_UP_MS)

    def __serve_build_asgi_app__(self) -> Guard:
        return create_app(self, Limits(self.cfg.body_bytes, self.cfg.ongoing), self.cfg.token())

    async def load(self, path: str) -> None:
        await self._bundles.ready(path)

    async def take(self, path: str) -> None:
        """Answer from this bundle from now on."""
        self._use(await self._bundles.ready(path))

    async def recommend(self, request: RecommendRequest) -> Answer:
        self._service.recommender.check(request)
        if request.budget_ms is not None:  # a batch has one deadline: nobody is to set it for others
            return self._told("recommend", await self._service.recommend(request))
        return self._told("recommend", await self._together((request, time.perf_counter())))

    async def _recommended(self, waiting: list[tuple[RecommendRequest, float]]) -> list[Answer]:
        requests, since = [request for request, _ in waiting], min(came for _, came in waiting)
        return await self._service.recommender.recommend(requests, self.cfg.budget_ms, since)

    async def recall(self, request: RecallRequest) -> Answer:
        return self._told("recall", await self._service.recall(request))

    async def rank(self, request: RankRequest) -> Answer:
        return self._told("rank", await self._service.rank(request))

    async def record(self, request: EventsRequest) -> EventsAnswer:
        return await self._service.record(request)

    def version(self) -> Version:
        pointer = Pointer.read(self.cfg.state)
        return self._service.version().model_copy(update={"refused": pointer and pointer.refused})

    def _opened(self, bundle: Bundle) -> LocalService:
        cfg = self.cfg
        state = open_state(Path(cfg.state), canonical_schema(bundle), cfg.state_url, cfg.model)
        return LocalService(bundle, state, Remote(bundle, *self._handles), self.cfg.budget_ms)

    def _use(self, service: LocalService) -> None:
        self._service = service
        self._telemetry.bundle(service.recommender.bundle.manifest.version)

    def _told(self, route: str, answer: Answer) -> Answer:
        self._telemetry.answered(route, answer)
        return answer


def _served(state: str) -> str:
    """The bundle that the service answers from by now, which a restarted replica joins."""
    pointer = Pointer.read(state)
    assert pointer is not None, "build() writes it before anything is deployed"
    return pointer.path


async def _called(response: Any) -> Any:
    try:
        return await response
    except (RayError, RayServeException) as error:
        raise StageError(str(error).splitlines()[0]) from error


def _user_side(schema: Any) -> list[str]:
    return [feature.name for feature in schema.features if "item" not in schema.sides(feature)]


def _to_ipc(table: pa.Table, columns: list[str]) -> bytes:
    chosen = table.select(columns).combine_chunks()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, chosen.schema) as writer:
        writer.write_table(chosen)
    return sink.getvalue().to_pybytes()


def _from_ipc(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(data).read_all()
