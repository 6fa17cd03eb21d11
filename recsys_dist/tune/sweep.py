"""Runs a sweep on a cluster: each job of the ledger is a real training run. The only ray.tune.

Ray Tune asks `_Jobs` what to run next and starts a process for it, which holds no CPU and drives a
`TorchTrainer` through `train.trainer.fit`. A job ends by itself: halving happens between jobs, so nothing
that trains is ever killed (killing a trial leaks its workers' placement group in some set-ups).
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

import ray
from pydantic import Field, field_validator
from ray import tune
from ray.tune.search import Searcher

from recsys_dist import session
from recsys_dist.config import Config, digest
from recsys_dist.data.output import remove_partials, sole_writer
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import ConfigError, NonFiniteLossError, RecsysError, TrainError
from recsys_dist.metrics import LESS_IS_BETTER
from recsys_dist.train import trainer
from recsys_dist.train.phase import best_epoch
from recsys_dist.train.settings import TrainConfig
from recsys_dist.tune.ledger import Job, Ledger, Plan, Result, next_check, next_job
from recsys_dist.tune.space import Space, Values, settings

_DRIVER_BYTES = 256 << 20  # of a trial's driver process, so that Ray does not start more than memory holds


class SweepConfig(Config):
    """A search around one training run. `trials` may grow later: the same sweep goes on."""

    train: TrainConfig = Field(description="what is not searched; its own settings are the first trial")
    space: dict[str, Any] = Field(description="dotted settings with {choice|log|uniform|int: [...]}")
    trials: int = Field(20, ge=1)
    rungs: tuple[float, ...] = Field(
        (1 / 16, 1 / 4, 1.0),
        description="parts of the rows that the run trains on, the newest ones; the last is all of them",
    )
    keep: int = Field(4, ge=2, description="one trial in so many goes on to the next rung")
    seed: int = 0
    concurrent: int | None = Field(None, ge=1, description="trials at a time; default: as many as have CPUs")
    check: bool = Field(False, description="afterwards train all trials in full, to see what was missed")

    @field_validator("rungs")
    @classmethod
    def _rising_to_one(cls, rungs: tuple[float, ...]) -> tuple[float, ...]:
        if not rungs or list(rungs) != sorted(set(rungs)) or rungs[0] <= 0 or rungs[-1] != 1:
            raise ValueError("expected rising fractions above 0 that end in 1, as in [0.0625, 0.25, 1]")
        return rungs

    @property
    def plan(self) -> Plan:
        return Plan(self.trials, self.rungs, self.keep, self.train.chosen_metric not in LESS_IS_BETTER)

    def fraction(self, rung: int) -> float:
        """The `newest_fraction` that a trial trains on at a rung."""
        return self.rungs[rung] * self.train.newest_fraction

    def directory(self, prepared: Prepared, out: str | Path) -> Path:
        """Where the sweep lives, below `out`: named after all that it means, how long it runs aside."""
        base = self.train.run_digest(prepared.manifest.data_digest)
        rest = self.model_dump(mode="json", exclude={"train", "trials", "concurrent", "check"})
        return Path(out).absolute() / f"sweep-{self.train.model.name}-{digest([base, rest])}"


class Listener(Protocol):
    """Hears of a sweep while it runs, in the process that drives it."""

    def started(self, trial: int, values: Values) -> None: ...

    def finished(self, result: Result, ledger: Ledger) -> None: ...


def sweep(cfg: SweepConfig, out: str | Path, listener: Listener) -> Ledger:
    """Run what the ledger of this sweep, below `out`, still lacks; returns the full ledger.

    Raises ConfigError before anything starts, TrainError where every trial failed.
    """
    prepared = Prepared.open(cfg.train.data)
    cfg.train.check(prepared)
    space = Space.parse(cfg.space, cfg.train, prepared)
    directory = cfg.directory(prepared, out)
    directory.mkdir(parents=True, exist_ok=True)
    with sole_writer(directory):
        remove_partials(directory)
        jobs = _Jobs(cfg, space, Ledger(directory / "trials.jsonl"), listener)
        if jobs.anything_left():
            # Ray warns of many small processes, as a sweep's are, beyond four times this number
            os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(2 * (os.cpu_count() or 1)))
            session.connect(dashboard=True)
            trainer.check_cluster(cfg.train)
            _run(jobs, cfg, directory)
        return jobs.ledger


class _Jobs(Searcher):
    """What Ray Tune asks for the next job, and tells how one went. Its only state is the ledger."""

    def __init__(self, cfg: SweepConfig, space: Space, ledger: Ledger, listener: Listener) -> None:
        super().__init__()
        self.cfg, self.space, self.ledger, self.listener = cfg, space, ledger, listener
        self.running: dict[str, Job] = {}

    def anything_left(self) -> bool:
        return self._next() is not None

    def suggest(self, trial_id: str) -> Any:
        job = self._next()
        if job is None:
            return None if self.running else Searcher.FINISHED
        if job.trial == len(self.ledger.trials):
            self.ledger.start(self._proposal())
        self.running[trial_id] = job
        values = self.ledger.trials[job.trial]
        self.listener.started(job.trial, values)
        fixed = {
            "data": str(Path(self.cfg.train.data).absolute()),
            "newest_fraction": self.cfg.fraction(job.rung),
            "refit": False,
            "checkpoints": None,  # most trials leave nothing behind
        }
        config = settings(self.cfg.train, {**values, **fixed})
        folder = self.ledger.file.parent / "trials" / f"{job.trial:03d}"
        return {
            "config": config.model_dump(mode="json"),
            "out": str(folder),
            "last": job.rung == self.cfg.plan.last,
        }

    def on_trial_complete(self, trial_id: str, result: dict | None = None, error: bool = False) -> None:
        job = self.running.pop(trial_id)
        if error or result is None or "outcome" not in result:
            found = _failed("the process that drove it died", again=True)
        else:
            found = json.loads(result["outcome"])
        self.ledger.finish(Result(job, **found))
        self.listener.finished(self.ledger.results[job], self.ledger)
        self._forget_losers()

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the ledger is saved already."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: a sweep goes on from its ledger."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune pickles it for a restore that we do not use

    def _next(self) -> Job | None:
        running = set(self.running.values())
        job = next_job(self.ledger, self.cfg.plan, running)
        if job is None and self.cfg.check and all(job.check for job in running):
            return next_check(self.ledger, self.cfg.plan, running)
        return job

    def _proposal(self) -> Values:
        told = self.ledger.told(self.cfg.plan)
        own = self.space.values_of(self.cfg.train)
        return self.space.propose(told, self.cfg.plan.maximise, own, self.cfg.seed)

    def _forget_losers(self) -> None:
        """Delete the runs on the last rung but that of its best trial, and those that are under way.

        Whole runs: a trial that was checked and is promoted later has to train its checkpoint anew.
        """
        best = self.ledger.ranked(self.cfg.plan.last, self.cfg.plan.maximise)[:1]
        kept = {*best, *(job.trial for job in self.running.values())}
        for job, result in self.ledger.results.items():
            if result.checkpoint and job.trial not in kept:
                shutil.rmtree(Path(result.checkpoint).parents[1], ignore_errors=True)


def _run(jobs: _Jobs, cfg: SweepConfig, directory: Path) -> None:
    scratch = directory / "ray"
    environment = {
        "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a table even when told to be quiet
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C ends the sweep; the same command goes on
    }
    os.environ.update(environment)
    tuner = tune.Tuner(
        tune.with_resources(_train, _resources(cfg.train)),
        tune_config=tune.TuneConfig(
            search_alg=jobs,
            num_samples=-1,  # until `suggest` says that it is finished
            max_concurrent_trials=_concurrent(cfg),
            reuse_actors=True,  # spares most jobs the start of a process
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=str(scratch), verbose=0),
    )
    try:
        died = tuner.fit().errors
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if not any(result.value is not None for result in jobs.ledger.results.values()):
        said = died[0] if died else next(result.error for result in jobs.ledger.results.values())
        raise TrainError(f"all {len(jobs.ledger.trials)} trials failed; the first: {said}")


def _train(job: dict[str, Any]) -> dict[str, Any]:
    """A trial's driver: trains, and returns a `Result` without its job, as text, for Ray flattens dicts."""
    try:
        outcome = _outcome(job)
    except RecsysError as error:  # of the cluster, the machine or a store: the next start may find it mended
        outcome = _failed(str(error), again=True)
    except Exception as error:  # a model's own, where there are no workers to raise it
        outcome = _failed(f"{type(error).__name__}: {error}", again=True)
    return {"outcome": json.dumps(outcome)}


def _outcome(job: dict[str, Any]) -> dict[str, Any]:
    cfg = TrainConfig.parse(job["config"])
    prepared = Prepared.open(cfg.data)
    try:
        trainer.refuse_what_does_not_fit(cfg, trainer.planned(cfg, prepared))
    except ConfigError as error:
        return _failed(str(error), again=False)
    try:
        fitted = trainer.fit(cfg, job["out"])
    except NonFiniteLossError as error:
        shutil.rmtree(trainer.run_directory(cfg, prepared, job["out"]) / "choose", ignore_errors=True)
        return _failed(str(error), again=False)
    if not job["last"]:
        shutil.rmtree(fitted.checkpoint.parent, ignore_errors=True)
    best = best_epoch(fitted.history, cfg.chosen_metric) - 1
    return {
        "value": fitted.history[best][cfg.chosen_metric],
        "trained_rows": sum(entry["trained_rows"] for entry in fitted.history),
        "seconds": fitted.seconds,
        "checkpoint": str(fitted.checkpoint) if job["last"] else None,
        "history": fitted.history,
    }


def _failed(error: str, again: bool) -> dict[str, Any]:
    return {"value": None, "trained_rows": 0, "seconds": 0.0, "error": error, "again": again}


def _resources(cfg: TrainConfig) -> dict[str, float]:
    """Of a trial's driver; without workers it is the driver that computes."""
    alone = cfg.num_workers == 0
    here = {"cpu": cfg.threads_per_worker, "gpu": int(cfg.use_gpu)} if alone else {"cpu": 0}
    return {**here, "memory": _DRIVER_BYTES}


def _concurrent(cfg: SweepConfig) -> int:
    """As many trials at a time as the cluster has CPUs, and GPUs, for; at least one."""
    if cfg.concurrent is not None:
        return cfg.concurrent
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    fits = resources.get("CPU", 0) // (cfg.train.most_workers * cfg.train.threads_per_worker)
    if cfg.train.use_gpu:
        fits = min(fits, resources.get("GPU", 0) // cfg.train.most_workers)
    return max(1, int(fits))
