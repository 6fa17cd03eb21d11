"""The Ray Serve application: `build(args)`, for `serve run`, `serve deploy`, RayService and jobs/serve.py.

A Watcher, beside the deployments that answer, asks the registry for a new champion, tries it out by its
golden requests, has every replica load it, and then switches. One that fails is refused, as /version tells.
"""

import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from recsys_dist import manifest, registry
from recsys_dist.bundle import Bundle
from recsys_dist.data.output import write_parquet, write_text
from recsys_dist.errors import RecsysError
from recsys_dist.serve import golden
from recsys_dist.serve.deployments import (
    RankStage,
    RecallStage,
    ServiceConfig,
    ServiceReplica,
    StageConfig,
)
from recsys_dist.serve.events import log_yaml
from recsys_dist.serve.pointer import Pointer
from recsys_dist.serve.state import EmbeddedState, canonical_schema

log = logging.getLogger("ray.serve")
_LOAD_TIMEOUT_S = 300.0


def build(args: dict[str, Any]) -> Application:
    """The application of a ServiceConfig; errors name what is wrong before anything is deployed.

    Where the registry does not answer, the bundle that was served last is served again.
    """
    cfg = ServiceConfig.parse(args)
    cfg = ServiceConfig.parse({**cfg.model_dump(), "state": str(Path(cfg.state).absolute())})
    try:
        Pointer(str(resolve(cfg))).write(cfg.state)
    except RecsysError as error:
        if Pointer.read(cfg.state) is None:
            raise
        log.warning("serving the bundle that was served last: %s", error)
    recall = _deployment(RecallStage, "Recall", cfg.recall).bind(cfg.state, cfg.recall.threads)
    ranking = _deployment(RankStage, "Ranking", cfg.ranking).bind(cfg.state, cfg.ranking.threads)
    values = cfg.model_dump(mode="json")
    stage = cfg.service.model_copy(update={"ongoing": 2 * cfg.ongoing})  # the guard's limit answers first
    service = _deployment(ServiceReplica, "Service", stage)
    watcher = serve.deployment(name="Watcher", ray_actor_options={"num_cpus": 0})(Watcher)
    return service.bind(values, recall, ranking, watcher.bind(values, recall, ranking))


def _deployment(cls: type, name: str, cfg: StageConfig) -> serve.Deployment:
    made: serve.Deployment = serve.deployment(
        name=name,
        num_replicas=cfg.replicas,
        ray_actor_options={"num_cpus": cfg.cpus},
        max_ongoing_requests=cfg.ongoing,
        max_queued_requests=cfg.queued,
        health_check_period_s=2,
        health_check_timeout_s=10,
    )(cls)
    return made


def resolve(cfg: ServiceConfig) -> Path:
    """The directory of the bundle that should be served: the one named, or the registry's alias."""
    if (Path(cfg.bundle) / manifest.MANIFEST).is_file():
        return Path(cfg.bundle).absolute()
    return registry.resolve(cfg.alias, Path(cfg.bundle), cfg.tracking_uri)


class Watcher:
    """Follows the registry, in a thread of its own, and writes new events to the log."""

    def __init__(self, cfg: dict[str, Any], recall: DeploymentHandle, ranking: DeploymentHandle) -> None:
        self._cfg = ServiceConfig.parse(cfg)
        self._stages = recall, ranking
        self._app = serve.get_replica_context().app_name
        self._served = self._refused = ""
        self._state: EmbeddedState | None = None
        threading.Thread(target=self._follow, name="watcher", daemon=True).start()

    def _follow(self) -> None:
        pause = threading.Event()
        while not pause.wait(self._cfg.poll_s):
            try:
                self._look()
            except (RecsysError, RayError, RayServeException, TimeoutError) as error:
                log.warning("watcher: %s", error)

    def _look(self) -> None:
        pointer = Pointer.read(self._cfg.state)
        assert pointer is not None, "build() writes it before anything is deployed"
        wanted = str(resolve(self._cfg))
        if wanted != pointer.path and wanted != self._refused:
            pointer = self._try(wanted, pointer)
        if pointer.path != self._served:  # also after this actor was replaced in the middle of a switch
            self._service().broadcast("take", pointer.path).results(timeout_s=_LOAD_TIMEOUT_S)
            self._describe_log(Bundle.open(pointer.path))
            self._served = pointer.path
        if self._state is not None:
            self._state.write_log()

    def _try(self, wanted: str, pointer: Pointer) -> Pointer:
        """The pointer to go on with: at the new bundle where every replica has it, else at the old one."""
        try:
            golden.replay(Bundle.open(wanted))
            for handle in (*self._stages, self._service()):
                handle.broadcast("load", wanted).results(timeout_s=_LOAD_TIMEOUT_S)
        except (RecsysError, RayError, RayServeException, TimeoutError) as error:
            self._refused = wanted
            pointer = replace(pointer, refused=str(error).splitlines()[0])
            log.warning("bundle refused, the old one stays: %s", pointer.refused)
        else:
            pointer = Pointer(wanted)
        pointer.write(self._cfg.state)
        return pointer

    def _service(self) -> DeploymentHandle:
        return serve.get_deployment_handle("Service", self._app)

    def _describe_log(self, bundle: Bundle) -> None:
        """Make the recorded events a log that `jobs.prepare parquet` reads."""
        directory = Path(self._cfg.state)
        write_parquet(bundle.users.attributes, directory / "users.parquet")
        write_parquet(bundle.items.attributes, directory / "items.parquet")
        write_text(log_yaml(bundle), directory / "log.yaml")
        self._state = EmbeddedState(directory, canonical_schema(bundle))
