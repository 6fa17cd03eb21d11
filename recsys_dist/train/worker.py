"""What each Ray Train worker runs: build, shard, restore, train epoch by epoch, validate, checkpoint.

A run has two phases: `choose` trains on the training days until the validation metric stops improving;
`refit` trains anew on training and validation days for the epochs that were best. Each phase goes on
from its newest whole checkpoint. All workers take every decision alike, from what rank 0 gave them.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray.train
import ray.train.torch
import torch
import torch.distributed as dist

from recsys_dist import cpu
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
from recsys_dist.data.output import write_text
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import CheckpointError, NonFiniteLossError, RecsysError, SupersededError
from recsys_dist.metrics import LESS_IS_BETTER
from recsys_dist.models.calibration import Points
from recsys_dist.models.protocol import Catalogue, model_module
from recsys_dist.models.ranking import Ranker
from recsys_dist.train import checkpoint as checkpoints
from recsys_dist.train import pretrained
from recsys_dist.train.calibrate import fit
from recsys_dist.train.catalogue import catalogue_of, occurrences
from recsys_dist.train.checkpoint import Checkpoint, Manifest, Position
from recsys_dist.train.fence import Fence
from recsys_dist.train.loop import Epoch, Loss, Totals, Workers, idle_batch
from recsys_dist.train.pretrained import RESULT
from recsys_dist.train.progress import Progress, Timer, steps_per_point
from recsys_dist.train.sampling import Stopwatch, features_of_tables
from recsys_dist.train.settings import TrainConfig
from recsys_dist.train.sharding import ShardedModel, shard
from recsys_dist.train.validate import item_vectors, ranked_rows, recall_users

FAILURE = "failure.json"  # why training cannot go on: written by a worker, read by the driver
RESERVE = "failure.reserve"  # gives way to FAILURE, so that a full disk can be told of


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


def train_worker(values: dict[str, Any]) -> None:
    """Entry point: `values` are {"config", "run", "start"}.

    A TrainConfig's fields, the run's directory, and the name of its start (see `train.fence`).
    """
    cfg, run = TrainConfig.parse(values["config"]), Path(values["run"])
    if (run / FAILURE).exists():
        return  # Ray Train started the workers again; this is not a failure that trying again mends
    cpu.configure(cfg.threads_per_worker)
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        Run(cfg, run, Fence(run, values["start"])).all_phases()
    except SupersededError:
        return  # the run is another's now, and so is its FAILURE
    except RecsysError as error:
        text = json.dumps({"kind": type(error).__name__, "message": str(error)})
        (run / RESERVE).unlink(missing_ok=True)
        write_text(text, run / FAILURE)
        if not isinstance(error, NonFiniteLossError | CheckpointError):
            raise  # the other workers may not know, and wait
        # These are raised on all workers alike: all end here, and Ray Train starts none of them again.


def best_epoch(history: list[dict[str, Any]], metric: str) -> int:
    """Number (from 1) of the first epoch that no other beats."""
    values = np.array([entry[metric] for entry in history])
    return int(np.nanargmax(-values if metric in LESS_IS_BETTER else values)) + 1


def _calibrated(model: Any) -> bool:
    """Whether it predicts a probability and has a map for it, which a model from elsewhere need not."""
    return isinstance(model, Ranker) and model.predicts is None


class Run:
    """One training run, as seen by one worker."""

    def __init__(self, cfg: TrainConfig, path: Path, fence: Fence) -> None:
        self.cfg = cfg
        self.path = path
        self.fence = fence
        self.workers = Workers()
        self._only_if(fence.take)
        self.background = checkpoints.Background(self.workers)
        self.prepared = Prepared.open(cfg.data)
        self.schema = cfg.inputs(self.prepared)
        self.device = ray.train.torch.get_device() if cfg.use_gpu else torch.device("cpu")
        self.idle = idle_batch(self.schema, cfg.rows_per_worker).to(self.device)
        self.progress = Progress(path, self.workers.rank, fence.holds, cfg.profile)

    def all_phases(self) -> None:
        """Choose the number of epochs, refit if asked to, and write down the result."""
        splits = self.cfg.training_splits(self.schema)
        held_out = "ranking/valid" if self.cfg.task == "ranking" else "users/valid"
        chosen = self.run(Phase("choose", splits["choose"], held_out, self.cfg.epochs))
        history = chosen.manifest.history
        epoch = best_epoch(history, self.cfg.chosen_metric)
        trained = list(history)
        if self.cfg.refit:
            refit = self.run(Phase("refit", splits["refit"], None, epoch, history[:epoch]))
            final, trained = refit.path, [*history, *refit.manifest.history]
        else:
            final = next((self.path / "choose").glob(f"epoch-{epoch:04d}-*"))
        self._only_if(self.fence.holds)
        if self.workers.rank == 0:
            seconds = sum(entry["seconds"] for entry in trained)
            result = {
                "checkpoint": str(final.relative_to(self.path)),
                "chosen_epoch": epoch,
                "history": history,
                "seconds": seconds,
                "rows_per_s": sum(entry["trained_rows"] for entry in trained) / seconds,
            }
            write_text(json.dumps(result), self.path / RESULT)
        self.workers.gather(None)

    def _only_if(self, held: Callable[[], bool]) -> None:
        """SupersededError, on all workers alike, where rank 0 may not write any more. Collective."""
        if not self.workers.agree(self.workers.rank > 0 or held()):
            raise SupersededError(f"{str(self.path)!r} was started anew, and goes on there")

    def run(self, phase: Phase) -> Checkpoint:
        """Train a phase to its end, from wherever it is; returns its last checkpoint. Collective."""
        newest = self.workers.agree(checkpoints.latest_valid(self.path / phase.name))
        done = newest.manifest.epoch if newest else 0
        if newest is not None and self._finished(phase, newest.manifest.history):
            return newest
        self.progress.resume(phase.name, done, newest.manifest.step if newest else 0)
        splits = ("train", "valid") if phase.valid is None else ("train",)
        catalogue = catalogue_of(self.prepared, self.schema, splits)
        train, valid = self._pieces(phase)
        if self.cfg.model.asks_occurrences:
            catalogue = replace(catalogue, occurrences=self._occurrences(self._mine(train)))
        sharded = self._build(catalogue)
        if newest is not None:
            checkpoints.load(newest, sharded)
        elif self.cfg.item_vectors is not None:
            vectors_ID = pretrained.item_vectors(self.cfg.item_vectors, phase.name)
            pretrained.start(sharded, self.schema, vectors_ID, self.cfg.item_vectors_std)
        self._calibrate(sharded.inner(), phase.calibration)
        manifest = newest.manifest if newest else self._manifest(phase)
        epochs = {e: shuffled(train, self.cfg.seed, e) for e in range(done + 1, phase.epochs + 1)}
        if manifest.position is not None:
            epochs[done + 1] = untrained(epochs[done + 1], manifest.position.trained)
        dealt = {epoch: deal(order, self.workers.size) for epoch, order in epochs.items()}
        rank = self.workers.rank
        feed = Feed([piece for shares in dealt.values() for piece in (*shares[rank], *valid)])
        committed = newest
        while committed is None or not self._finished(phase, committed.manifest.history):
            epoch = manifest.epoch + 1
            sharded.scale_rates(self._rate(phase.chosen[: epoch - 1] or manifest.history))
            totals = self._train(phase, feed, dealt[epoch], sharded, catalogue, manifest)
            metrics = self._validate(phase, feed, valid, sharded)
            spent = {"seconds": totals.seconds, "loader_s": totals.loader_s, "saving_s": totals.saving_s}
            entry = {"epoch": epoch, "loss": totals.loss, "trained_rows": totals.rows, **spent, **metrics}
            finished = {
                "epoch": epoch,
                "step": _first_step(manifest) + totals.steps,
                "history": [*manifest.history, entry],
                "position": None,
            }
            manifest = Manifest.parse({**manifest.model_dump(), **finished})
            committed = self._commit(phase, sharded, catalogue, manifest)
        feed.close()
        return committed

    def _rate(self, history: list[dict[str, Any]]) -> float:
        """What the learning rates are multiplied by after the epochs of `history`, which were validated."""
        if self.cfg.optimizer.plateau is None:
            return 1.0
        metric = self.cfg.chosen_metric
        worse = sum(best_epoch(history[:n], metric) != n for n in range(1, len(history) + 1))
        return self.cfg.optimizer.plateau**worse

    def _finished(self, phase: Phase, history: list[dict[str, Any]]) -> bool:
        if len(history) >= phase.epochs:
            return True
        if phase.valid is None or not history:
            return False
        return len(history) - best_epoch(history, self.cfg.chosen_metric) >= self.cfg.patience

    def _build(self, catalogue: Catalogue) -> ShardedModel:
        torch.manual_seed(self.cfg.seed)
        model = model_module(self.cfg.model.name).Model(self.cfg.model, self.schema, catalogue)
        loss = Loss(model)
        groups = model.table_groups()
        return shard(loss, groups, self.cfg.optimizer, self.cfg.sharding, self.cfg.seed, self.device)

    def _manifest(self, phase: Phase) -> Manifest:
        prepared = self.prepared.manifest
        return Manifest(
            model=self.cfg.model.model_dump(mode="json"),
            label=self.cfg.label,
            data_schema=self.prepared.schema,
            vocabulary_digest=prepared.vocabulary_digest,
            data_digest=prepared.data_digest,
            seed=self.cfg.seed,
            phase=phase.name,
            epoch=0,
            step=0,
            history=[],
        )

    def _pieces(self, phase: Phase) -> tuple[list[Piece], list[Piece]]:
        """All training shards, and this worker's share of the validation rows."""
        names = [*columns(self.schema), "weight"]
        files, since = self._training_files(phase)
        held_out = self._files(phase.valid) if phase.valid else []
        valid = stored(held_out, [*names, "user_id", "truth", "seen"])
        return stored(files, names, since), self._mine(valid)

    def _mine(self, pieces: list[Piece]) -> list[Piece]:
        return deal(pieces, self.workers.size)[self.workers.rank]

    def _occurrences(self, train: list[Piece]) -> dict[str, torch.Tensor]:
        """Of all workers' training rows. Collective."""
        feed = Feed(train)
        mine = occurrences(
            (collate(table, self.schema) for table in feed.take(train, self.idle.rows)), self.schema
        )
        feed.close()
        theirs = self.workers.gather(mine)
        return {table: torch.stack([counts[table] for counts in theirs]).sum(0) for table in mine}

    def _training_files(self, phase: Phase) -> tuple[list[tuple[str, int]], int | None]:
        """What to train on: each file with its rows that are new enough, and since when they are."""
        files = [file for split in phase.train for file in self._files(split)]
        fraction = self.cfg.newest_fraction
        return (files, None) if fraction == 1 else newest_rows(files, fraction)

    def _files(self, split: str) -> list[tuple[str, int]]:
        return list(zip(self.prepared.files(split), self.prepared.shards(split).rows, strict=True))

    def _train(
        self,
        phase: Phase,
        feed: Feed,
        shares: list[list[Piece]],
        sharded: ShardedModel,
        catalogue: Catalogue,
        manifest: Manifest,
    ) -> Totals:
        """Train the rest of an epoch, dealt to the workers as `shares`. Collective."""
        number, before = manifest.epoch + 1, manifest.position or Position()
        totals = replace(before.totals)
        expected = totals.rows + sum(piece.rows for share in shares for piece in share)
        first = _first_step(manifest)
        curve = self.progress.curve(phase.name, number, phase.epochs, first, expected, totals)
        key = (self.cfg.seed, "dropout", phase.name, self.workers.rank)
        epoch = Epoch(
            sharded.model,
            sharded.optimizers,
            self.idle,
            self.workers,
            curve,
            sample_steps=steps_per_point(expected, self.cfg.batch_rows),
            stopwatch=Stopwatch(sharded.lookups(), self.device),
            tables=features_of_tables(self.schema),
            seed=int(rng_for(*key).integers(2**62)),
            due=Timer(self.cfg.checkpoint_every_s).due,
            totals=totals,
        )

        def save(mine: int) -> None:
            counts = self.workers.gather(mine)
            done = [p for share, rows in zip(shares, counts, strict=True) for p in cut(share, rows)[0]]
            position = Position(
                trained=with_trained(before.trained, done),
                totals=replace(totals, gradients={}, step_ms={}, tables={}),
            )
            now = {"step": first + totals.steps, "position": position}
            self._only_if(self.fence.holds)
            self.background.save(
                self.path / phase.name,
                sharded,
                catalogue,
                Manifest.parse({**manifest.model_dump(), **now}),
                then=partial(self._retain, phase),
            )

        epoch.save = save
        share = shares[self.workers.rank]
        batches = (collate(table, self.schema) for table in feed.take(share, self.idle.rows))
        try:
            return epoch.run(batches, manifest.step)
        except NonFiniteLossError as error:
            files = " and ".join(f"{self.prepared.path / split}/part-*.parquet" for split in phase.train)
            raise NonFiniteLossError(f"{error} (shards are {files})") from None

    def _validate(
        self, phase: Phase, feed: Feed, pieces: list[Piece], sharded: ShardedModel
    ) -> dict[str, Any]:
        """Exact metrics over all workers' rows, alike on all of them. Collective.

        A ranker is calibrated on them too: `calibration` are the points of the map, which the model takes.
        """
        if phase.valid is None:
            return {}
        model = sharded.inner().eval()
        self._calibrate(model, [])  # metrics, and the next map, are of the model's own scores
        tables = feed.take(pieces, self.idle.rows)
        steps = max(self.workers.gather(-(-sum(piece.rows for piece in pieces) // self.idle.rows)))
        batches = (next(tables, None) for _ in range(steps))  # lookups are collective: equally many for all
        states: Sequence[Any]
        if self.cfg.task == "ranking":
            states = [ranked_rows(model, table, self.schema, self.idle) for table in batches]
            settings: tuple[Any, ...] = ()
        else:
            item_ID, k = item_vectors(model), self.cfg.recall_at
            states = [recall_users(model, item_ID, table, self.schema, self.idle, k) for table in batches]
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
        self._calibrate(model, found.get("calibration", []))
        return found

    def _calibrate(self, model: Any, points: Points) -> None:
        if _calibrated(model):
            model.calibration.set(points)

    def _commit(
        self, phase: Phase, sharded: ShardedModel, catalogue: Catalogue, manifest: Manifest
    ) -> Checkpoint:
        root = self.path / phase.name
        self.background.wait()
        self._only_if(self.fence.holds)
        saved = checkpoints.save(root, sharded, catalogue, manifest, self.workers)
        self._retain(phase, saved)
        entry = saved.manifest.history[-1]
        self.progress.epoch(phase.name, phase.epochs, entry)
        ray.train.report({"phase": phase.name, **entry})
        return saved

    def _retain(self, phase: Phase, saved: Checkpoint) -> None:
        """Forget all checkpoints of a phase but this one and that of the best epoch."""
        if self.workers.rank > 0 or not self.fence.holds():
            return
        root, history = self.path / phase.name, saved.manifest.history
        best = best_epoch(history, self.cfg.chosen_metric) if phase.valid and history else 0
        checkpoints.retain(root, [saved.path, *root.glob(f"epoch-{best:04d}-*")])


def _first_step(manifest: Manifest) -> int:
    """Number of the first step of the epoch that a checkpoint is in, or before."""
    return manifest.step - (manifest.position.totals.steps if manifest.position else 0)
