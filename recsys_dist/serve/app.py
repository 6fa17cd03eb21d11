"""The Ray Serve application: `build(args)`, for `serve run`, `serve deploy`, RayService and jobs/serve.py.

A Watcher, beside the deployments that answer, asks the registry for a new champion, tries it out by its
golden requests, has every replica load it, and then switches. One that fails is refused, as /version tells.
"""

import asyncio
import contextlib
import io
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from recsys_dist import manifest
from recsys_dist.bundle import Bundle
from recsys_dist.errors import RecsysError, RegistryError, ServeError, StateError
from recsys_dist.registry import Registry, RegistryConfig
from recsys_dist.serve import golden
from recsys_dist.serve.deployments import (
    RankStage,
    RecallStage,
    ServiceConfig,
    ServiceReplica,
    StageConfig,
)
from recsys_dist.serve.events import describe_log
from recsys_dist.serve.pointer import Pointer
from recsys_dist.serve.state import UserState, canonical_schema, check_state, open_state

log = logging.getLogger("ray.serve")
APP = "recsys"
_LOAD_TIMEOUT_S = 300.0
_REQUEST_TIMEOUT_S = 30.0


def build(args: dict[str, Any]) -> Application:
    """The application of a ServiceConfig; errors name what is wrong before anything is deployed.

    Where the registry does not answer, or names a bundle that fails its checks, the one that was served last
    is served again.
    """
    cfg = ServiceConfig.parse(args)
    places = {"state": cfg.state, "bundle": cfg.bundle, "token_file": cfg.token_file}
    absolute = {name: str(Path(place).absolute()) for name, place in places.items() if place is not None}
    cfg = ServiceConfig.parse({**cfg.model_dump(), **absolute})  # replicas may run in other directories
    cfg.token()
    try:
        wanted = resolve(cfg)
        golden.replay(Bundle.open(wanted))
        Pointer(str(wanted)).write(cfg.state)
    except RecsysError as error:
        if cfg.registry is None or Pointer.read(cfg.state) is None:
            raise
        log.warning("serving the bundle that was served last: %s", error)
    check_state(cfg.state_url, cfg.model)
    recall = _deployment(RecallStage, "Recall", cfg.recall).bind(cfg.state, cfg.recall.threads)
    ranking = _deployment(RankStage, "Ranking", cfg.ranking).bind(cfg.state, cfg.ranking.threads)
    values = cfg.model_dump(mode="json")
    stage = cfg.service.model_copy(update={"ongoing": 2 * cfg.ongoing})  # the guard's limit answers first
    service = _deployment(ServiceReplica, "Service", stage)
    watcher = serve.deployment(name="Watcher", ray_actor_options={"num_cpus": 0})(Watcher)
    return service.bind(values, recall, ranking, watcher.bind(values, recall, ranking))


def run(app: Application, cfg: ServiceConfig, host: str, port: int) -> str:
    """Start what `build` made on the connected cluster, wait until it answers; the bundle's version."""
    log.setLevel(logging.WARNING)
    serve.start(http_options={"host": host, "port": port, "request_timeout_s": _REQUEST_TIMEOUT_S})
    try:
        serve.run(app, name=APP, route_prefix="/")
    except (RuntimeError, TimeoutError) as error:  # what Ray Serve says of deployments that fail, or wait
        said = str(error).partition("\n")[0] or type(error).__name__
        raise ServeError(f"the service did not start: {said}") from error
    pointer = Pointer.read(cfg.state)
    assert pointer is not None
    return manifest.read(Path(pointer.path)).version


def stop() -> None:
    """End the service and Ray Serve with it."""
    with contextlib.redirect_stdout(io.StringIO()):  # where Ray tells of its own controller's end as an error
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def _deployment(cls: type, name: str, cfg: StageConfig) -> serve.Deployment:
    made: serve.Deployment = serve.deployment(
        name=name,
        num_replicas=cfg.replicas,
        ray_actor_options={"num_cpus": cfg.cpus},
        max_ongoing_requests=cfg.ongoing,
        max_queued_requests=cfg.queued,
        logging_config=LoggingConfig(enable_access_log=False),
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2,
        health_check_timeout_s=10,
    )(cls)
    return made


def resolve(cfg: ServiceConfig) -> Path:
    """The directory of the bundle that should be served: the one named, or the registry's alias."""
    if cfg.registry is None:
        assert cfg.bundle is not None
        manifest.verify(Path(cfg.bundle))
        return Path(cfg.bundle).absolute()
    return _registry(cfg.registry, cfg.model).resolve(cfg.alias, Path(cfg.state) / "bundles")


def _registry(uri: str, model: str) -> Registry:
    return Registry(RegistryConfig.parse({"uri": uri, "model": model}))


class Watcher:
    """Follows the registry, and writes new events to the log. Ray Serve replaces it where it fails."""

    def __init__(self, cfg: dict[str, Any], recall: DeploymentHandle, ranking: DeploymentHandle) -> None:
        self._cfg = ServiceConfig.parse(cfg)
        self._registry = _registry(self._cfg.registry, self._cfg.model) if self._cfg.registry else None
        self._stages = recall, ranking
        self._app = serve.get_replica_context().app_name
        self._served = self._refused = ""  # a path, and a version
        self._state: UserState | None = None
        self._task: asyncio.Task[None] | None = None

    async def check_health(self) -> None:
        """Called by Ray Serve every few seconds: starts the task, and raises what ended it."""
        if self._task is None:
            self._task = asyncio.create_task(self._follow())
        elif self._task.done():
            self._task.result()

    async def _follow(self) -> None:
        while True:
            for step in (self._look, self._write_log):  # either goes on where the other fails
                try:
                    await step()
                except (RecsysError, RayError, RayServeException, TimeoutError) as error:
                    log.error("watcher, will try again: %s", error)  # below errors, logs are buffered
            await asyncio.sleep(self._cfg.poll_s)

    async def _look(self) -> None:
        pointer = Pointer.read(self._cfg.state)
        assert pointer is not None, "build() writes it before anything is deployed"
        wanted = await asyncio.to_thread(self._wanted)
        if wanted == Path(pointer.path).name:
            self._refused = ""
            if pointer.refused:  # what was refused is no longer wanted
                pointer = Pointer(pointer.path)
                pointer.write(self._cfg.state)
        elif wanted is not None and wanted != self._refused:
            pointer = await self._try(wanted, pointer)
        if pointer.path != self._served:  # also after this actor was replaced in the middle of a switch
            await self._everywhere(self._service(), "take", pointer.path)
            await asyncio.to_thread(self._describe_log, pointer.path)
            self._served = pointer.path

    async def _write_log(self) -> None:
        if self._state is not None:
            await asyncio.to_thread(self._state.write_log)

    def _wanted(self) -> str | None:
        """The version of the bundle to serve; None where nothing says that it changes."""
        if self._registry is None:
            return None
        try:
            return self._registry.current(self._cfg.alias)
        except RegistryError as error:
            log.error("watcher: the registry does not answer, so nothing changes: %s", error)
            return None

    async def _try(self, version: str, pointer: Pointer) -> Pointer:
        """The pointer to go on with: at the new bundle where every replica has it, else at the old one.

        Only the bundle's own faults refuse it, such as files that are gone from the registry; a replica that
        died meanwhile is asked again.
        """
        try:
            wanted = str(await asyncio.to_thread(resolve, self._cfg))
            for handle in (*self._stages, self._service()):
                await self._everywhere(handle, "load", wanted)
        except (RecsysError, RayTaskError) as error:
            reason = error if isinstance(error, RecsysError) else error.cause
            if not isinstance(reason, RecsysError) or isinstance(reason, RegistryError | StateError):
                raise
            self._refused = version
            pointer = replace(pointer, refused=str(reason).splitlines()[0])
            log.error("bundle refused, the old one stays: %s", pointer.refused)
        else:
            pointer = Pointer(wanted)
        pointer.write(self._cfg.state)
        return pointer

    async def _everywhere(self, handle: DeploymentHandle, method: str, path: str) -> None:
        await handle.broadcast(method, path).results_async(timeout_s=_LOAD_TIMEOUT_S)

    def _service(self) -> DeploymentHandle:
        return serve.get_deployment_handle("Service", self._app)

    def _describe_log(self, path: str) -> None:
        bundle, directory = Bundle.open(path), Path(self._cfg.state)
        describe_log(bundle, directory)
        cfg, former = self._cfg, self._state
        if former is not None:
            former.close()
        self._state = open_state(directory, canonical_schema(bundle), cfg.state_url, cfg.model)
