"""The driver of a training run: a TorchTrainer, its progress, and how it goes on after any interruption."""

import concurrent.futures
import contextlib
import json
import logging
import os
import re
import shutil
import sys
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.constants import TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S as END_TIMEOUT
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from ray.train.v2._internal.constants import WORKER_GROUP_START_TIMEOUT_S_ENV_VAR as ROOM_TIMEOUT
from tqdm import tqdm

from recsys_dist import errors, session
from recsys_dist.data import pipeline
from recsys_dist.data.output import write_text
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import CheckpointError, ConfigError, RecsysError, SupersededError, TrainError
from recsys_dist.train import storage
from recsys_dist.train.checkpoint import MANIFEST, committed, verify
from recsys_dist.train.counted import count, counts
from recsys_dist.train.fence import FENCE, take_over
from recsys_dist.train.plan import Plan, plan
from recsys_dist.train.pretrained import RESULT
from recsys_dist.train.progress import PROGRESS, Place, read
from recsys_dist.train.settings import TrainConfig
from recsys_dist.train.worker import FAILURE, LESS_MEMORY, RESERVE, backend, train_worker

log = logging.getLogger(__name__)
OnReport = Callable[[dict[str, Any]], None]
_POLL_S = 0.3
_FULL_MEMORY = re.compile(r"Memory on the node .* was (\S+) used / (\S+) limit")  # in ray's OutOfMemoryError
_OF_WORKERS = re.compile(r"^\[Rank .* Error Snippet\]:$", re.MULTILINE)  # in ray.train's WorkerGroupError
_FRAME = re.compile(
    r"^  File .*\n(?:    .*\n)*", re.MULTILINE
)  # of a traceback; the message follows the last
_RESERVE_BYTES = 8192
BAR = "{desc}{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows [{elapsed}{postfix}]"


@dataclass(frozen=True)
class FitResult:
    """A finished run. `history` has an entry per epoch of choosing: loss, trained_rows, seconds, metrics.

    seconds     of training, over all epochs of both phases, without validation
    rows_per_s  trained rows a second, over all workers
    peak_bytes  the most that was resident of each worker of the last start; empty for runs of older versions
    """

    run: Path
    checkpoint: Path
    chosen_epoch: int
    history: list[dict[str, Any]]
    seconds: float
    rows_per_s: float
    peak_bytes: Sequence[int] = ()


def fit(cfg: TrainConfig, out: str | Path, on_report: OnReport | None = None) -> FitResult:
    """Train, in a directory below `out` that is named after the configuration and the data.

    A run that was interrupted goes on; one that is finished returns at once, unless its checkpoint is damaged
    since: the phase that made it is then trained anew. `on_report` is called in a
    thread of this process with each line of progress (see `train.progress`), those of former starts too.
    Raises ConfigError before anything starts, TrainError or another RecsysError when training cannot go on.
    """
    prepared = Prepared.open(cfg.data)
    cfg.check(prepared)
    run = run_directory(cfg, prepared, out)
    _forget_what_is_damaged(cfg, run)
    cfg = _from_anywhere(cfg)
    with _reports(run / PROGRESS, on_report):
        if not (run / RESULT).exists() and counts(cfg):
            run.mkdir(parents=True, exist_ok=True)
            write_text(cfg.to_yaml(), run / "config.yaml")
            count(cfg, prepared, run)
        if not (run / RESULT).exists():
            refuse_what_does_not_fit(cfg, planned(cfg, prepared))
            if cfg.checkpoints is not None:
                storage.probe(cfg.checkpoints)
            session.connect()
            check_cluster(cfg)
            write_text(cfg.to_yaml(), run / "config.yaml")
            write_text(" " * _RESERVE_BYTES, run / RESERVE)
            (run / FAILURE).unlink(missing_ok=True)
            _train(cfg, run, prepared.manifest.data_digest)
            (run / RESERVE).unlink(missing_ok=True)
    _bring_here(cfg, run)
    return _result(run)


def finished(cfg: TrainConfig, prepared: Prepared, out: str | Path) -> FitResult | None:
    """What `fit` would return at once; None where it would have to train."""
    run = run_directory(cfg, prepared, out)
    return _result(run) if (run / RESULT).exists() else None


def _result(run: Path) -> FitResult:
    found = json.loads((run / RESULT).read_text())
    return FitResult(run=run, **{**found, "checkpoint": run / found["checkpoint"]})


def _bring_here(cfg: TrainConfig, run: Path) -> None:
    """Copy a finished run's checkpoints into its directory, where whatever comes after training reads them.

    That of the result comes last.
    """
    elsewhere = storage.below(cfg.checkpoints, run)
    final = json.loads((run / RESULT).read_text())["checkpoint"]
    if elsewhere == run or (run / final / MANIFEST).exists():
        return
    phases = [path for path in storage.listed(elsewhere) if path.name != FENCE]
    found = [path for phase in phases for path in storage.listed(phase, "epoch-") if committed(path)]
    for path in sorted(found, key=lambda path: f"{path.parent.name}/{path.name}" == final):
        storage.fetch(path, run / path.parent.name, last=MANIFEST)


def _forget_what_is_damaged(cfg: TrainConfig, run: Path) -> None:
    """A finished run whose checkpoint is there, and not whole, is not finished, unless it is a store's copy.

    Older checkpoints of its phase, from which to go on, are gone.
    """
    if not (run / RESULT).exists():
        return
    checkpoint = run / json.loads((run / RESULT).read_text())["checkpoint"]
    if checkpoint.exists():  # a sweep deletes those that it does not want
        try:
            verify(checkpoint)
        except CheckpointError as error:
            store = storage.below(cfg.checkpoints, run)
            if store != run and committed(store / checkpoint.parent.name / checkpoint.name):
                shutil.rmtree(checkpoint)  # and fetched again
                return
            log.warning("%r is trained anew: %s", checkpoint.parent.name, error)
            (run / RESULT).unlink()
            shutil.rmtree(checkpoint.parent)


def planned(cfg: TrainConfig, prepared: Prepared) -> list[Plan]:
    """What is placed where, by the fewest workers and by the most; ConfigError where it cannot be trained."""
    cfg.check(prepared)
    if counts(cfg):
        raise ConfigError(
            f"{cfg.model.name} counts, and has no tables that could be placed: leave out --plan"
        )
    return [plan(cfg, prepared, n) for n in sorted({cfg.fewest_workers, cfg.most_workers})]


def refuse_what_does_not_fit(cfg: TrainConfig, plans: list[Plan]) -> None:
    """ConfigError where this machine could not hold it.

    What fits on a cluster that one joins is not known beforehand.
    """
    if not os.environ.get("RAY_ADDRESS") and not cfg.use_gpu:
        plans[0].refuse_beyond(psutil.virtual_memory().total)


def run_directory(cfg: TrainConfig, prepared: Prepared, out: str | Path) -> Path:
    """Where the run of this configuration on this data lives, below `out`."""
    name = f"{cfg.task}-{cfg.model.name}-{cfg.run_digest(prepared.manifest.data_digest)}"
    return Path(out).absolute() / name


class _Trainer(TorchTrainer):
    """Leaves Ctrl-C to Python: Ray's handler ends the process without a word, and outlives `fit`.

    And starts no processes that do nothing here, of 2 to 3 s of CPU time each: one, at every start of the
    workers, hands out data sets, and they read theirs themselves; the other frees what a controller that died
    has held, and on a cluster that was started here its driver ends with it.
    """

    def _register_sigint_handler(self, controller: Any) -> None:
        pass

    def _create_default_callbacks(self) -> list[Any]:
        idle: list[type] = [DatasetsCallback]
        if not os.environ.get("RAY_ADDRESS"):
            idle.append(PlacementGroupCleanerCallback)
        every = super()._create_default_callbacks()  # type: ignore[misc]
        return [one for one in every if not isinstance(one, tuple(idle))]


def _train(cfg: TrainConfig, run: Path, data_digest: str) -> None:
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    if cfg.num_workers == 0:
        pipeline.quiet()  # it reads its data here
        warnings.filterwarnings("ignore", "Please use DTensor", FutureWarning)  # torch's to TorchRec
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # notices a lost worker sooner
    if not os.environ.get("RAY_ADDRESS"):  # it is a process more to start, and tells of machines taken away
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # a group's processes are ended after it, so Ray need not wait 30 s for one of them that hangs to leave it
    os.environ.setdefault(END_TIMEOUT, "3")
    ENV_VARS_TO_PROPAGATE.add(END_TIMEOUT)
    elastic = cfg.fewest_workers < cfg.most_workers
    # Ray's view of the nodes is up to 20 s old: an elastic run that lost one may find no room a few times,
    # which is no failure of the training
    os.environ[ROOM_TIMEOUT] = "10" if elastic else "60"
    # a worker that hangs alone: with others, their collectives end
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(cfg.timeout_s)
    scratch = run / "ray"  # Ray Train's own files, of no use afterwards: we resume from our checkpoints
    trainer = _Trainer(
        train_worker,
        train_loop_config={
            "config": cfg.model_dump(mode="json"),
            "run": str(run),
            "start": take_over(run, cfg.checkpoints),
            "data_digest": data_digest,
        },
        scaling_config=ScalingConfig(
            num_workers=cfg.num_workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=cfg.resize_every_s,  # type: ignore[call-arg]
            use_gpu=cfg.use_gpu,
            resources_per_worker={"CPU": cfg.threads_per_worker, **({"GPU": 1} if cfg.use_gpu else {})},
        ),
        torch_config=TorchConfig(backend(cfg), timeout_s=cfg.timeout_s),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:8],  # a fresh one: a broken snapshot of Ray's must not stop a run
            storage_path=str(scratch),
            failure_config=FailureConfig(
                max_failures=cfg.max_failures,
                controller_failure_limit=10 * (cfg.max_failures + 1) if elastic else cfg.max_failures,  # type: ignore[call-arg]
            ),
        ),
    )
    try:
        trainer.fit()
    except (TrainingFailedError, RayError) as error:  # the latter where Ray Train's controller was ended
        raise _explained(error, run, cfg) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if (run / FAILURE).exists():
        raise _explained(None, run, cfg)
    if not (run / RESULT).exists():
        raise SupersededError(f"{str(run)!r} was started anew by another process, and goes on there")


def _from_anywhere(cfg: TrainConfig) -> TrainConfig:
    """With absolute paths, for workers, and for runs that start from this one, in other directories."""
    named = {key: getattr(cfg, key) for key in ("data", "item_vectors", "warm_start")}
    paths = {key: str(Path(path).absolute()) for key, path in named.items() if path}
    if cfg.checkpoints is not None:
        paths["checkpoints"] = str(storage.root(cfg.checkpoints))
    return TrainConfig.parse({**cfg.model_dump(mode="json"), **paths})


def _explained(error: Exception | None, run: Path, cfg: TrainConfig) -> RecsysError:
    """What a worker wrote down before it gave up; else that workers were lost too often."""
    if (run / FAILURE).exists():
        found = json.loads((run / FAILURE).read_text())
        kind: type[RecsysError] = getattr(errors, found["kind"])
        return kind(found["message"])
    kept = f"what is committed in {str(run)!r} is kept, and the same command goes on from there"
    if full := _FULL_MEMORY.search(str(error)):
        return TrainError(
            f"the memory of a machine was full ({full[1]} used of {full[2]}), and Ray ended what it runs "
            f"there more often than max_failures={cfg.max_failures} allows: end what else is on it, or "
            f"{LESS_MEMORY}; {kept}"
        )
    return TrainError(
        f"training failed more often than max_failures={cfg.max_failures} allows; {kept}. The last failure: "
        f"{_without_tracebacks(str(error))}"
    )


def _without_tracebacks(said: str) -> str:
    """Of Python exceptions what each worker raised, once; the tracebacks are in Ray's logs of the workers."""
    if "Traceback (most recent call last)" not in said:
        return said
    first, *of_workers = _OF_WORKERS.split(said)
    raised = (_FRAME.split(part)[-1].strip().splitlines()[0] for part in of_workers or [first])
    return "; ".join(dict.fromkeys(raised))


def check_cluster(cfg: TrainConfig) -> None:
    """ConfigError where the workers could never all be placed: Ray would wait for ever."""
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    workers = cfg.fewest_workers
    asked = {"CPU": workers * cfg.threads_per_worker, "GPU": workers if cfg.use_gpu else 0}
    for kind, wanted in asked.items():
        if wanted > resources.get(kind, 0):
            raise ConfigError(
                f"num_workers={cfg.num_workers} with threads_per_worker={cfg.threads_per_worker} need "
                f"{wanted} {kind}s and the cluster has {resources.get(kind, 0):g}; take fewer workers"
            )


@contextlib.contextmanager
def _reports(file: Path, on_report: OnReport | None) -> Iterator[None]:
    """Follow the progress file until the block ends: a bar on a terminal, and `on_report`."""
    done = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        followed = pool.submit(_follow, file, on_report, done)
        try:
            yield
        finally:
            done.set()
        followed.result()  # what `on_report` raised, it raises here


def _follow(file: Path, on_report: OnReport | None, done: threading.Event) -> None:
    place, last = Place(), False
    noticed: list[dict[str, Any]] = []  # a phase that goes on writes the file anew, with what it keeps
    with tqdm(bar_format=BAR, unit_scale=True, leave=False, disable=not sys.stderr.isatty()) as bar:
        while not last:
            last = done.wait(_POLL_S)  # one more look after the end
            for line, after in read(file, place):
                place = after
                if line in noticed:
                    continue
                if on_report is not None:
                    on_report(line)
                if line["kind"] == "notice":
                    noticed.append(line)
                    tqdm.write("\n  ".join([f"{line['what']}:", *line["details"]]), file=sys.stderr)
                if line["kind"] == "curve":
                    show(line, bar)


def show(line: dict[str, Any], bar: "tqdm[Any]") -> None:
    """A point of the learning curve on the bar.

    Its own rate would count Ray's start, validation, and rows that were trained before a restart.
    """
    left = tqdm.format_interval((line["of_rows"] - line["rows"]) / line["rows_per_s"])
    bar.set_description(f"{line['phase']} epoch {line['epoch']}/{line['epochs']}", refresh=False)
    bar.set_postfix_str(
        f"{line['rows_per_s']:,.0f} rows/s, {left} left, loss {line['loss']:.4f}", refresh=False
    )
    bar.total, bar.n = line["of_rows"], line["rows"]
    bar.refresh()
