"""Writes checkpoints: full ones at once, and behind training, from a copy, full ones or increments."""

import math
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from recsys_dist.errors import CheckpointError, NonFiniteLossError, StoreError
from recsys_dist.models.protocol import Catalogue
from recsys_dist.train import storage
from recsys_dist.train.checkpoint import (
    CATALOGUE,
    ITEM_FEATURE,
    MANIFEST,
    Checkpoint,
    FileEntry,
    Manifest,
    entry_of,
    live_state,
)
from recsys_dist.train.increments import Base, Touched
from recsys_dist.train.loop import Loss, Workers
from recsys_dist.train.pieces import copied, local
from recsys_dist.train.sharding import ShardedModel
from recsys_dist.train.storage import AnyPath


def watch(sharded: ShardedModel, at_most: float) -> None:
    """Have `Background` save only what changed, where that is at most such a share of a full checkpoint."""
    weights, whole = sharded.weights(), sharded.optimizers.tables
    fused = {name: weights[name] for name in sharded.tables if name not in whole}
    sharded.touched = Touched(fused, sharded.tables, sharded.lookups(), at_most)


def save(
    root: AnyPath, sharded: ShardedModel, catalogue: Catalogue, manifest: Manifest, workers: Workers
) -> Checkpoint:
    """Write a full checkpoint into a fresh directory below `root`. Collective; all see one file system.

    Raises, on all workers alike, CheckpointError where it cannot be written, as on a full disk, and
    NonFiniteLossError where there is a number that is none; older checkpoints stay as they were.
    """
    saved = _write(root, _state(sharded, catalogue), _placed(manifest, sharded, workers), workers)
    if sharded.touched is not None:
        sharded.touched.begin(saved.as_base())
    return saved


def save_whole(root: AnyPath, model: nn.Module, catalogue: Catalogue, manifest: Manifest) -> Checkpoint:
    """The same of a model that no workers share and no optimizer has a state of."""
    weights = {f"weights.{name}": weight for name, weight in Loss(model).state_dict().items()}
    return _write(root, weights | _of_items(catalogue), manifest, Workers())


class Background:
    """Saves while training goes on: what is to be saved is copied, and written by a thread.

    The thread talks to those of the other workers in a group of their own, `workers`, which waits long.
    """

    def __init__(self, workers: Workers) -> None:
        self.workers = workers.apart()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def save(
        self,
        root: AnyPath,
        sharded: ShardedModel,
        catalogue: Catalogue,
        manifest: Manifest,
        then: Callable[[Checkpoint], None] = lambda _: None,
    ) -> None:
        """`save` of what there is now, `then` what is to follow. Collective.

        Where the rows are watched and few enough have changed, of those alone. Waits for the one before, and
        raises what that one raised.
        """
        self.wait()
        touched, base, state = sharded.touched, None, _state(sharded, catalogue)
        learned = {name: value for name, value in state.items() if not name.startswith(CATALOGUE)}
        if touched is not None and touched.base is not None and self._few(touched, learned):
            base, state = touched.base, touched.changed(learned)
        else:
            state = {name: copied(value) for name, value in state.items()}
            if touched is not None:
                touched.begin(None)
        manifest = _placed(manifest, sharded, self.workers, base)

        def write() -> None:
            saved = _write(root, state, manifest, self.workers)
            if touched is not None and base is None:
                touched.base = saved.as_base()
            then(saved)

        self._running = self._pool.submit(write)

    def _few(self, touched: Touched, state: dict[str, Any]) -> bool:
        whole, changed = self.workers.start_sum([float(size) for size in touched.sizes(state)])()
        return changed <= touched.at_most * whole

    def wait(self) -> None:
        """Until nothing is being written. Raises what `save` would have raised."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()


def _state(sharded: ShardedModel, catalogue: Catalogue) -> dict[str, Any]:
    dense = {f"dense.{key}": value for key, value in sharded.optimizers.state().items()}
    return {**live_state(sharded), **_of_items(catalogue), **dense}


def _of_items(catalogue: Catalogue) -> dict[str, torch.Tensor]:
    features = {f"{ITEM_FEATURE}{name}": values for name, values in catalogue.features.items()}
    return {f"{CATALOGUE}positives": catalogue.positives, **features}


def _finite(state: dict[str, Any]) -> bool:
    """Whether what this worker has learned has neither NaN nor infinity in it."""
    learned = [value for name, value in state.items() if not name.startswith(CATALOGUE)]
    held = [tensor for value in learned for tensor, _ in local(value)]
    ends = [end for t in held if t.is_floating_point() and t.numel() for end in t.aminmax()]
    return all(map(math.isfinite, ends))


def _placed(
    manifest: Manifest, sharded: ShardedModel, workers: Workers, base: Base | None = None
) -> Manifest:
    placed = {"plan": sharded.plan(), "workers": workers.size, "base": base}
    return Manifest.parse({**manifest.model_dump(), **placed})


def _write(root: AnyPath, state: dict[str, Any], manifest: Manifest, workers: Workers) -> Checkpoint:
    if not all(workers.gather(_finite(state))):
        raise NonFiniteLossError(f"after step {manifest.step} weights are not finite; they are not saved")
    at = f"epoch-{manifest.epoch:04d}" if manifest.position is None else f"step-{manifest.step:09d}"
    path = root / workers.agree(f"{at}-{uuid.uuid4().hex[:8]}")
    with _removing_torn(path):
        written = dcp.save(
            state,
            storage_writer=storage.writer(path),
            process_group=workers.group,
            no_dist=not dist.is_initialized(),
        )
        entries = _entries(path, workers)
        lost = {info.relative_path for info in written.storage_data.values()} - entries.keys()
        if lost:  # as where a newer group of workers tidies up
            raise CheckpointError(f"{str(path)!r} lost {', '.join(sorted(lost))} while it was written")
    manifest = Manifest.parse({**manifest.model_dump(), "files": entries})

    def commit() -> None:
        with _removing_torn(path):
            storage.put(manifest.model_dump_json(indent=1), path / MANIFEST)

    workers.from_first(commit)  # for all, or for none
    return Checkpoint(path, manifest)


def _entries(path: AnyPath, workers: Workers) -> dict[str, FileEntry]:
    """What the manifest says of all files, each read by who wrote it. Collective.

    CheckpointError, on all workers alike, where one of them cannot be read back.
    """
    found: dict[str, FileEntry] | CheckpointError
    try:
        with storage.reading(path):
            mine = [file for file in storage.listed(path) if _belongs_to(file.name, workers.rank)]
            found = {file.name: entry_of(file) for file in mine}
    except (StoreError, OSError) as error:
        found = CheckpointError(f"{str(path)!r} cannot be read back: {error}")
    entries: dict[str, FileEntry] = {}
    for theirs in workers.gather(found):
        if isinstance(theirs, CheckpointError):
            raise theirs
        entries |= theirs
    return entries


@contextmanager
def _removing_torn(path: AnyPath) -> Iterator[None]:
    """CheckpointError where the block cannot write the checkpoint `path`; what there is of it is removed."""
    try:
        with storage.writing(path):
            try:
                yield
            except CheckpointException as error:  # what went wrong on any worker, raised on all
                raise next(iter(error.failures.values()))[0] from None
    except CheckpointError:
        storage.remove(path)
        raise


def _belongs_to(name: str, rank: int) -> bool:
    """DCP names a rank's files `__<rank>_<n>.distcp`; the metadata is rank 0's."""
    return name.startswith(f"__{rank}_") or (rank == 0 and not name.startswith("__"))
