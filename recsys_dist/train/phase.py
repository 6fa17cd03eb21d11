"""One phase of a run, from wherever it is to its end: train an epoch, validate, commit.

A phase that is interrupted, anywhere, goes on from its newest whole checkpoint. All workers take every
decision alike, from what rank 0 gave them.
"""

import contextlib
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys_dist.config import rng_for
from recsys_dist.data.collate import collate, columns
from recsys_dist.data.feed import Feed
from recsys_dist.data.order import (
    Piece,
    cut,
    deal,
    newest_rows,
    shuffled,
    stored,
    untrained,
    with_trained,
)
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import CheckpointError, ConfigError, NonFiniteLossError, StoreError, SupersededError
from recsys_dist.metrics import LESS_IS_BETTER
from recsys_dist.models.calibration import Points
from recsys_dist.models.protocol import model_module
from recsys_dist.models.ranking import Ranker
from recsys_dist.train import checkpoint as checkpoints
from recsys_dist.train import pretrained, saving, storage, warm_start
from recsys_dist.train.ahead import schedule
from recsys_dist.train.calibrate import fit
from recsys_dist.train.catalogue import catalogue_of, occurrences
from recsys_dist.train.checkpoint import Checkpoint, Manifest, Position
from recsys_dist.train.fence import Fence
from recsys_dist.train.loop import Epoch, Loss, Totals, Workers, idle_batch
from recsys_dist.train.plan import balanced
from recsys_dist.train.progress import Progress, Timer, steps_per_point
from recsys_dist.train.sampling import Stopwatch, features_of_tables
from recsys_dist.train.settings import TrainConfig
from recsys_dist.train.sharding import shard
from recsys_dist.train.validate import item_vectors, ranked_rows, recall_users


@dataclass(frozen=True)
class Phase:
    """Splits to train on, a split to validate on or None, and epochs at most.

    chosen  where the number of epochs was chosen before: the history up to the best one
    """

    name: str
    train: tuple[str, ...]
    valid: str | None
    epochs: int
    chosen: list[dict[str, Any]] = field(default_factory=list)

    @property
    def calibration(self) -> Points:
        """A refitted model has no rows of its own left to calibrate on; it takes the map of its twin."""
        return self.chosen[-1].get("calibration", []) if self.chosen else []


class Common:
    """What one worker has throughout a run, whatever phase it is in."""

    def __init__(self, cfg: TrainConfig, path: Path, fence: Fence, device: torch.device) -> None:
        self.cfg = cfg
        self.path = path
        self.checkpoints = storage.below(cfg.checkpoints, path)
        self.fence = fence
        self.device = device
        self.workers = Workers()
        self.only_if(fence.take)
        self.background = saving.Background(self.workers)
        self.prepared = Prepared.open(cfg.data)
        self.schema = cfg.inputs(self.prepared)
        self.parts = cfg.parts(self.workers.size)
        self.idle = idle_batch(self.schema, max(self.parts)).to(device)
        self.progress = Progress(path, self.workers.rank, fence.holds_here, cfg.profile)

    def only_if(self, held: Callable[[], bool]) -> None:
        """SupersededError, on all workers alike, where rank 0 may not write any more. Collective."""
        if not self.workers.agree(self.workers.rank > 0 or held()):
            raise SupersededError(f"{str(self.path)!r} was started anew, and goes on there")


def best_epoch(history: list[dict[str, Any]], metric: str) -> int:
    """Number (from 1) of the first epoch that no other beats; ConfigError where the metric has no value."""
    values = np.array([entry[metric] for entry in history], float)  # None, as it is stored, becomes NaN
    if np.isnan(values).all():
        where = "the validation rows, as where all of each user's have one outcome; choose by another metric"
        raise ConfigError(f"no epoch can be chosen: {metric} has no value on {where}")
    return int(np.nanargmax(-values if metric in LESS_IS_BETTER else values)) + 1


def finish(common: Common, phase: Phase, rollbacks: int = 0) -> Checkpoint:
    """Train a phase to its end; returns its last checkpoint. Collective.

    Where the loss is not finite: from the newest checkpoint again, with half the learning rates, until that
    was done `max_rollbacks` times; `rollbacks` were before this phase.
    """
    while True:
        attempt = _Attempt(common, phase, rollbacks)
        try:
            return attempt.to_its_end()
        except NonFiniteLossError as error:
            rollbacks = attempt.rollbacks + 1
            if rollbacks > common.cfg.max_rollbacks:
                raise
            what = f"rollback {rollbacks}, to the newest checkpoint, and on with half the learning rates"
            common.progress.notice(phase.name, what, [str(error)])
        with contextlib.suppress(NonFiniteLossError):  # the same again
            attempt.wait()


class _Attempt:
    """A phase from its newest whole checkpoint on."""

    def __init__(self, common: Common, phase: Phase, rollbacks: int) -> None:
        self.common = common
        self.cfg, self.schema, self.workers = common.cfg, common.schema, common.workers
        self.phase = phase
        self.root = common.checkpoints / phase.name
        passed_over: list[str] = []
        self.newest = common.background.workers.from_first(  # who reads all of it takes its time
            lambda: checkpoints.latest_valid(self.root, passed_over.append)
        )
        if passed_over:
            start = self.newest.path.name if self.newest else "its start"
            common.progress.notice(
                phase.name, f"{phase.name} goes on from {start}, passing over", passed_over
            )
        self.manifest = self.newest.manifest if self.newest else self._manifest()
        self.rollbacks = max(rollbacks, self.manifest.rollbacks)

    def to_its_end(self) -> Checkpoint:
        if self.newest is not None and self._finished(self.manifest.history):
            return self.newest
        phase, done, rank = self.phase, self.manifest.epoch, self.workers.rank
        self.common.progress.resume(phase.name, done, self.manifest.step)
        train, valid = self._pieces()
        self._build(train)
        epochs = {e: shuffled(train, self.cfg.seed, e) for e in range(done + 1, phase.epochs + 1)}
        if self.manifest.position is not None:
            epochs[done + 1] = untrained(epochs[done + 1], self.manifest.position.trained)
        dealt = {epoch: deal(order, self.common.parts) for epoch, order in epochs.items()}
        feed = Feed([piece for shares in dealt.values() for piece in (*shares[rank], *valid)])
        committed = self.newest
        with contextlib.closing(feed):
            while committed is None or not self._finished(committed.manifest.history):
                committed = self._epoch(feed, dealt[self.manifest.epoch + 1], valid)
        return committed

    def _epoch(self, feed: Feed, shares: list[list[Piece]], valid: list[Piece]) -> Checkpoint:
        """Train what is left of the next epoch, validate and commit it. Collective."""
        before, epoch = self.manifest, self.manifest.epoch + 1
        self.sharded.scale_rates(self._rate(self.phase.chosen[: epoch - 1] or before.history))
        totals = self._train(feed, shares)
        metrics = self._validate(feed, valid)
        spent = {"seconds": totals.seconds, "loader_s": totals.loader_s, "saving_s": totals.saving_s}
        rows = {"trained_rows": totals.rows, "skipped_rows": totals.skipped}
        entry = {"epoch": epoch, "loss": totals.loss, **rows, **spent, **metrics}
        finished = {
            "epoch": epoch,
            "step": _first_step(before) + totals.steps,
            "history": [*before.history, entry],
            "position": None,
            "rollbacks": self.rollbacks,
        }
        self.manifest = Manifest.parse({**before.model_dump(), **finished})
        return self._commit()

    def _rate(self, history: list[dict[str, Any]]) -> float:
        """What the learning rates are multiplied by after the epochs of `history`, which were validated."""
        now = self.cfg.resized_rate(self.workers.size) * 0.5**self.rollbacks
        if self.cfg.optimizer.plateau is None:
            return now
        metric = self.cfg.chosen_metric
        worse = sum(best_epoch(history[:n], metric) != n for n in range(1, len(history) + 1))
        return now * self.cfg.optimizer.plateau**worse

    def _finished(self, history: list[dict[str, Any]]) -> bool:
        if len(history) >= self.phase.epochs:
            return True
        if self.phase.valid is None or not history:
            return False
        return len(history) - best_epoch(history, self.cfg.chosen_metric) >= self.cfg.patience

    def _build(self, train: list[Piece]) -> None:
        """The sharded model as the newest checkpoint has it, or as it starts. Collective."""
        gc.collect()  # a former phase's model: TorchRec's modules are cycles
        cfg, phase, common = self.cfg, self.phase, self.common
        splits = ("train",) if phase.valid else ("train", "valid")
        catalogue = catalogue_of(common.prepared, self.schema, splits)
        if cfg.model.asks_occurrences:
            catalogue = replace(catalogue, occurrences=self._occurrences(self._mine(train)))
        self.catalogue = catalogue
        placed = balanced(cfg, common.prepared, catalogue, common.workers.size)
        torch.manual_seed(cfg.seed)
        model = model_module(cfg.model.name).Model(cfg.model, self.schema, catalogue)
        loss = Loss(model, autocast=cfg.autocast is not None)
        self.sharded = shard(loss, loss.model.table_groups(), cfg.optimizer, placed, cfg.seed, common.device)
        if cfg.checkpoint_every_s is not None and cfg.checkpoint_increments > 0:
            saving.watch(self.sharded, cfg.checkpoint_increments)
        if self.newest is not None:
            checkpoints.load(self.newest, self.sharded, common.background.workers.group)
        elif cfg.item_vectors is not None:
            vectors_ID = pretrained.item_vectors(cfg.item_vectors, phase.name)
            pretrained.start(self.sharded, self.schema, vectors_ID, cfg.item_vectors_std)
        elif cfg.warm_start is not None:
            told = warm_start.start(self.sharded, self.schema, common.prepared, cfg.warm_start, phase.name)
            common.progress.notice(phase.name, f"{phase.name} starts from {cfg.warm_start}", told)
        self._calibrate(phase.calibration)

    def _manifest(self) -> Manifest:
        prepared, run = self.common.prepared.manifest, self.cfg.warm_start
        step, chain = warm_start.goes_on_from(run, self.phase.name) if run else (0, None)
        return Manifest(
            model=self.cfg.model.model_dump(mode="json"),
            label=self.cfg.label,
            data_schema=self.common.prepared.schema,
            vocabulary_digest=prepared.vocabulary_digest,
            data_digest=prepared.data_digest,
            seed=self.cfg.seed,
            phase=self.phase.name,
            epoch=0,
            step=step,
            history=[],
            chain=chain,
        )

    def _pieces(self) -> tuple[list[Piece], list[Piece]]:
        """All training shards, and this worker's share of the validation rows."""
        names = [*columns(self.schema), "weight"]
        files, since = self._training_files()
        held_out = self._files(self.phase.valid) if self.phase.valid else []
        valid = stored(held_out, [*names, "user_id", "truth", "seen"])
        return stored(files, names, since), self._mine(valid)

    def _mine(self, pieces: list[Piece]) -> list[Piece]:
        return deal(pieces, [1] * self.workers.size)[self.workers.rank]

    def _occurrences(self, train: list[Piece]) -> dict[str, torch.Tensor]:
        """Of all workers' training rows. Collective."""
        feed = Feed(train)
        mine = occurrences(
            (collate(table, self.schema) for table in feed.take(train, self.common.idle.rows)), self.schema
        )
        feed.close()
        theirs = self.workers.gather(mine)
        return {table: torch.stack([counts[table] for counts in theirs]).sum(0) for table in mine}

    def _training_files(self) -> tuple[list[tuple[str, int]], int | None]:
        """What to train on: each file with its rows that are new enough, and since when they are."""
        files = [file for split in self.phase.train for file in self._files(split)]
        fraction = self.cfg.newest_fraction
        return (files, None) if fraction == 1 else newest_rows(files, fraction)

    def _files(self, split: str) -> list[tuple[str, int]]:
        return list(
            zip(self.common.prepared.files(split), self.common.prepared.shards(split).rows, strict=True)
        )

    def _train(self, feed: Feed, shares: list[list[Piece]]) -> Totals:
        """Train the rest of an epoch, dealt to the workers as `shares`. Collective."""
        common, phase, manifest = self.common, self.phase, self.manifest
        number, before = manifest.epoch + 1, manifest.position or Position()
        totals = replace(before.totals)
        expected = totals.passed + sum(piece.rows for share in shares for piece in share)
        first = _first_step(manifest)
        curve = common.progress.curve(phase.name, number, phase.epochs, first, expected, totals)
        key = (self.cfg.seed, "dropout", phase.name, self.workers.rank)
        epoch = Epoch(
            self.sharded.model,
            self.sharded.optimizers,
            common.idle,
            self.workers,
            curve,
            sample_steps=steps_per_point(expected, sum(common.parts)),
            stopwatch=Stopwatch(self.sharded.lookups(), common.device),
            tables=features_of_tables(self.schema),
            seed=int(rng_for(*key).integers(2**62)),
            due=Timer(self.cfg.checkpoint_every_s).due,
            skip_steps=self.cfg.skip_steps,
            totals=totals,
            schedule=schedule(common.device),
        )

        def save(mine: int) -> None:
            counts = self.workers.gather(mine)
            done = [p for share, rows in zip(shares, counts, strict=True) for p in cut(share, rows)[0]]
            position = Position(
                trained=with_trained(before.trained, done),
                totals=replace(totals, gradients={}, step_ms={}, tables={}),
            )
            now = {"step": first + totals.steps, "position": position, "rollbacks": self.rollbacks}
            common.only_if(common.fence.holds)
            self.wait()
            common.background.save(
                self.root,
                self.sharded,
                self.catalogue,
                Manifest.parse({**manifest.model_dump(), **now}),
                then=self._retain,
            )

        epoch.save = save
        tables = feed.take(shares[self.workers.rank], common.parts[self.workers.rank])
        batches = (collate(table, self.schema) for table in tables)
        try:
            return epoch.run(batches, manifest.step)
        except NonFiniteLossError as error:
            files = " and ".join(f"{common.prepared.path / split}/part-*.parquet" for split in phase.train)
            raise NonFiniteLossError(f"{error} (shards are {files})") from None

    def _validate(self, feed: Feed, pieces: list[Piece]) -> dict[str, Any]:
        """Exact metrics over all workers' rows, alike on all of them. Collective.

        A ranker is calibrated on them too: `calibration` are the points of the map, which the model takes.
        """
        if self.phase.valid is None:
            return {}
        model, idle = self.sharded.inner().eval(), self.common.idle
        self._calibrate([])  # metrics, and the next map, are of the model's own scores
        tables = feed.take(pieces, idle.rows)
        steps = max(self.workers.gather(-(-sum(piece.rows for piece in pieces) // idle.rows)))
        batches = (next(tables, None) for _ in range(steps))  # lookups are collective: equally many for all
        states: Sequence[Any]
        if self.cfg.task == "ranking":
            states = [ranked_rows(model, table, self.schema, idle) for table in batches]
            settings: tuple[Any, ...] = ()
        else:
            item_ID, k = item_vectors(model), self.cfg.recall_at
            states = [recall_users(model, item_ID, table, self.schema, idle, k) for table in batches]
            settings = ((k,),)
        scored = [s for s in states if s is not None]
        first, *others = [s for theirs in self.workers.gather(scored) for s in theirs]
        found: dict[str, Any] = {}
        if self.workers.rank == 0:
            merged = first.merge(*others)
            found = merged.compute(*settings)
            if _calibrated(model):
                found["calibration"] = fit(self.cfg.calibration, merged.scores, merged.labels)
        found = self.workers.agree(found)
        self._calibrate(found.get("calibration", []))
        return found

    def _calibrate(self, points: Points) -> None:
        model = self.sharded.inner()
        if _calibrated(model):
            model.calibration.set(points)

    def _commit(self) -> Checkpoint:
        common = self.common
        self.wait()
        common.only_if(common.fence.holds)
        workers = common.background.workers
        saved = saving.save(self.root, self.sharded, self.catalogue, self.manifest, workers)
        workers.from_first(lambda: self._retain(saved))  # a slow store must not time the others out
        entry, chain = saved.manifest.history[-1], saved.manifest.chain
        common.progress.epoch(self.phase.name, self.phase.epochs, entry, chain.epochs if chain else 0)
        return saved

    def wait(self) -> None:
        """Until nothing is being saved; where a store missed what was, training goes on."""
        try:
            self.common.background.wait()
        except CheckpointError as error:
            if self.cfg.checkpoints is None:
                raise
            self.common.progress.notice(self.phase.name, "a checkpoint is left out", [str(error)])

    def _retain(self, saved: Checkpoint) -> None:
        """Forget all checkpoints of the phase but this one and that of the best epoch."""
        if self.workers.rank > 0 or not self.common.fence.holds():
            return
        keep, history = saved.stands_on(), saved.manifest.history
        best = best_epoch(history, self.cfg.chosen_metric) if self.phase.valid and history else 0
        with contextlib.suppress(StoreError):  # what is not deleted now goes with the next one
            if saved.manifest.position is not None or best < saved.manifest.epoch:  # else it is the best one
                keep += filter(checkpoints.committed, storage.listed(self.root, f"epoch-{best:04d}-"))
            checkpoints.retain(self.root, keep)


def _first_step(manifest: Manifest) -> int:
    """Number of the first step of the epoch that a checkpoint is in, or before."""
    return manifest.step - (manifest.position.totals.steps if manifest.position else 0)


def _calibrated(model: Any) -> bool:
    """Whether it predicts a probability and has a map for it, which a model from elsewhere need not."""
    return isinstance(model, Ranker) and model.predicts is None
