"""Checkpoints that are committed or do not exist, and load at any worker count and any sharding.

A checkpoint is a fresh directory: the tensors as torch.distributed.checkpoint writes them, then, fsynced
and last, `manifest.json` with the sha256 of every file. A directory whose files do not match its manifest
is torn and is passed over. (DCP's own `.metadata` is a pickle: it is read only after its sha256 was.)
"""

import hashlib
import logging
import math
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import Field, ValidationError
from torch import nn
from torch.distributed.checkpoint import CheckpointException, FileSystemReader, FileSystemWriter

from recsys_dist.config import Config
from recsys_dist.data.output import naming, write_text
from recsys_dist.errors import CheckpointError, DataError, NonFiniteLossError
from recsys_dist.models.protocol import Catalogue, model_module, model_schema
from recsys_dist.schema import Schema
from recsys_dist.train.loop import Loss, Totals, Workers
from recsys_dist.train.pieces import copied, local
from recsys_dist.train.sharding import ShardedModel, materialise

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 22
_ITEM_FEATURE = "catalogue.features."  # prefix of the saved features of the catalogue

log = logging.getLogger(__name__)


class FileEntry(Config):
    size_bytes: int
    sha256: str


class Position(Config):
    """Where in an epoch a checkpoint was made.

    trained  shard -> intervals of positions in the epoch's order (see `data.order`) whose rows were trained
    totals   of the epoch so far
    """

    trained: dict[str, list[tuple[int, int]]] = Field(default_factory=dict)
    totals: Totals = Field(default_factory=Totals)


class Manifest(Config):
    """What a checkpoint is of. `epoch` counts finished epochs, `step` finished steps, both of its phase."""

    files: dict[str, FileEntry] = Field(default_factory=dict)
    model: dict[str, Any]
    label: str | None = None  # None: the schema's ranking_label
    data_schema: Schema
    vocabulary_digest: str
    data_digest: str
    seed: int
    phase: str
    epoch: int
    step: int
    history: list[dict[str, Any]]  # an entry per finished epoch, metrics included
    position: Position | None = None  # None: between two epochs
    rollbacks: int = 0  # how often training went back to a checkpoint before this one, up to it
    plan: dict[str, Any] = Field(default_factory=dict)
    workers: int = 1

    @property
    def metrics(self) -> dict[str, Any]:
        """The validation metrics of the last finished epoch."""
        return self.history[-1] if self.history else {}


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its directory and its manifest."""

    path: Path
    manifest: Manifest


def save(
    root: Path, sharded: ShardedModel, catalogue: Catalogue, manifest: Manifest, workers: Workers
) -> Checkpoint:
    """Write a checkpoint into a fresh directory below `root`. Collective; all workers see one file system.

    Raises, on all workers alike, CheckpointError where it cannot be written, as on a full disk, and
    NonFiniteLossError where there is a number that is none; older checkpoints stay as they were.
    """
    return _write(root, _state(sharded, catalogue), _with_plan(manifest, sharded, workers), workers)


class Background:
    """Saves while training goes on: what is to be saved is copied, and written by a thread.

    The thread talks to those of the other workers in a group of their own.
    """

    def __init__(self, workers: Workers) -> None:
        self._workers = workers.apart()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None

    def save(
        self,
        root: Path,
        sharded: ShardedModel,
        catalogue: Catalogue,
        manifest: Manifest,
        then: Callable[[Checkpoint], None] = lambda _: None,
    ) -> None:
        """`checkpoint.save` of what there is now, `then` what is to follow. Collective.

        Waits for the one before, and raises what that one raised.
        """
        self.wait()
        state = {name: copied(value) for name, value in _state(sharded, catalogue).items()}
        manifest = _with_plan(manifest, sharded, self._workers)
        self._running = self._pool.submit(lambda: then(_write(root, state, manifest, self._workers)))

    def wait(self) -> None:
        """Until nothing is being written. Raises what `checkpoint.save` would have raised."""
        if self._running is not None:
            running, self._running = self._running, None
            running.result()


def _state(sharded: ShardedModel, catalogue: Catalogue) -> dict[str, Any]:
    state = {**_live_state(sharded), "catalogue.positives": catalogue.positives}
    state |= {f"{_ITEM_FEATURE}{name}": values for name, values in catalogue.features.items()}
    return state | {f"dense.{key}": value for key, value in sharded.optimizers.state().items()}


def _finite(state: dict[str, Any]) -> bool:
    """Whether what this worker has learned has neither NaN nor infinity in it."""
    learned = [value for name, value in state.items() if not name.startswith("catalogue.")]
    held = [tensor for value in learned for tensor, _ in local(value)]
    ends = [end for t in held if t.is_floating_point() and t.numel() for end in t.aminmax()]
    return all(map(math.isfinite, ends))


def _with_plan(manifest: Manifest, sharded: ShardedModel, workers: Workers) -> Manifest:
    placed = {"plan": sharded.plan(), "workers": workers.size}
    return Manifest.parse({**manifest.model_dump(), **placed})


def _write(root: Path, state: dict[str, Any], manifest: Manifest, workers: Workers) -> Checkpoint:
    if not all(workers.gather(_finite(state))):
        raise NonFiniteLossError(f"after step {manifest.step} weights are not finite; they are not saved")
    at = f"epoch-{manifest.epoch:04d}" if manifest.position is None else f"step-{manifest.step:09d}"
    path = root / workers.agree(f"{at}-{uuid.uuid4().hex[:8]}")
    writer = FileSystemWriter(path, sync_files=True)
    with _removing_torn(path):
        dcp.save(state, storage_writer=writer, process_group=workers.group, no_dist=not dist.is_initialized())
    mine = {f.name: _entry(f) for f in sorted(path.iterdir()) if _belongs_to(f.name, workers.rank)}
    entries: dict[str, FileEntry] = {}
    for theirs in workers.gather(mine):
        entries |= theirs
    manifest = Manifest.parse({**manifest.model_dump(), "files": entries})
    refused = None
    if workers.rank == 0:
        try:
            with _removing_torn(path):
                write_text(manifest.model_dump_json(indent=1), path / MANIFEST)
        except CheckpointError as error:
            refused = error
    refused = workers.agree(refused)  # committed for all, or for none
    if refused is not None:
        raise refused
    return Checkpoint(path, manifest)


def load(checkpoint: Checkpoint, sharded: ShardedModel) -> None:
    """Restore weights and optimizer states, wherever they live now. Collective."""
    state = _live_state(sharded)
    dense = _empty_like_saved(checkpoint.path, "dense.")
    dcp.load(
        {**state, **dense},
        storage_reader=FileSystemReader(checkpoint.path),
        no_dist=not dist.is_initialized(),
    )
    sharded.optimizers.load_state({key.removeprefix("dense."): value for key, value in dense.items()})


def load_for_inference(path: Path | str, schema: Schema | None = None) -> tuple[nn.Module, Manifest]:
    """The whole model of a checkpoint in this process, in eval mode; needs neither Ray nor other workers.

    Raises CheckpointError for a torn checkpoint, or one of another schema than `schema` where given.
    """
    manifest = verify(Path(path))
    if schema is not None:
        refuse_other_schema(manifest, schema)
    module = model_module(manifest.model["name"])
    cfg = module.Config.parse(manifest.model)
    inputs = model_schema(cfg, manifest.data_schema, manifest.label)
    model: nn.Module = module.Model(cfg, inputs, saved_catalogue(Path(path)))
    loss = materialise(Loss(model), manifest.seed)
    try:
        read(Path(path), {f"weights.{name}": weight for name, weight in loss.state_dict().items()})
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise CheckpointError(
            f"{str(path)!r} was saved by another version of model {manifest.model['name']!r}: {reason} "
            "Train it anew with this one"
        ) from None
    return model.eval(), manifest


def saved_catalogue(path: Path) -> Catalogue:
    """What the model of a checkpoint was told of the items."""
    saved = _empty_like_saved(path, "catalogue.")
    read(path, saved)
    features = {k.removeprefix(_ITEM_FEATURE): v for k, v in saved.items() if k.startswith(_ITEM_FEATURE)}
    return Catalogue(saved["catalogue.positives"], features)


def saved_shapes(path: Path) -> dict[str, torch.Size]:
    """Of each tensor of a checkpoint: `weights.<name>`, `sums.<name>`, `dense.<name>.<slot>`, ..."""
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    return {key: entry.size for key, entry in saved.items()}  # type: ignore[union-attr]


def latest_valid(root: Path) -> Checkpoint | None:
    """The checkpoint with the most steps that is whole; warns of each newer one that is not."""
    found: list[Checkpoint] = []
    for path in all_below(root):
        try:
            found.append(Checkpoint(path, _manifest(path)))
        except CheckpointError as error:
            log.warning("passing over a checkpoint: %s", error)
    for checkpoint in sorted(found, key=lambda c: (c.manifest.step, c.manifest.epoch), reverse=True):
        try:
            verify(checkpoint.path)
        except CheckpointError as error:
            log.warning("passing over a checkpoint: %s", error)
        else:
            return checkpoint
    return None


def all_below(root: Path) -> list[Path]:
    """Directories of checkpoints, torn ones too: of finished epochs, and within one."""
    return sorted([*root.glob("epoch-*"), *root.glob("step-*")])


def verify(path: Path) -> Manifest:
    """The manifest of a whole checkpoint; CheckpointError says what is missing or damaged."""
    manifest = _manifest(path)
    for name, entry in manifest.files.items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != entry.size_bytes:
            raise CheckpointError(f"{str(file)!r} has {size} bytes instead of {entry.size_bytes}")
        if _entry(file) != entry:
            raise CheckpointError(f"{str(file)!r} was changed: its sha256 is not the manifest's")
    return manifest


def _manifest(path: Path) -> Manifest:
    try:
        return Manifest.model_validate_json((path / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{str(path)!r} was never committed: it has no {MANIFEST}") from None
    except (ValidationError, OSError) as error:
        raise CheckpointError(f"{str(path / MANIFEST)!r} cannot be read: {error}") from None


def refuse_other_schema(manifest: Manifest, schema: Schema) -> None:
    """CheckpointError naming the features that differ between a checkpoint and the data's schema."""
    if manifest.data_schema.digest() == schema.digest():
        return
    then = {f.name: f.model_dump() for f in (*manifest.data_schema.features, *manifest.data_schema.labels)}
    now = {f.name: f.model_dump() for f in (*schema.features, *schema.labels)}
    differences = [f"{name!r} is new" for name in now if name not in then]
    differences += [f"{name!r} is gone" for name in then if name not in now]
    for name in (n for n in now if n in then and now[n] != then[n]):
        keys = [k for k in {**then[name], **now[name]} if then[name].get(k) != now[name].get(k)]
        changes = ", ".join(f"{key} {then[name].get(key)!r} -> {now[name].get(key)!r}" for key in keys)
        differences.append(f"{name!r} changed: {changes}")
    said = "; ".join(differences) or "the same features with other settings or in another order"
    raise CheckpointError(f"the checkpoint was made for another schema: {said}. Train anew on this data")


def retain(root: Path, keep: Iterable[Path]) -> None:
    """Delete all checkpoints below `root`, torn ones too, but those to `keep`. One worker calls it."""
    kept = {path.name for path in keep}
    for path in all_below(root):
        if path.name not in kept:
            (path / MANIFEST).unlink(missing_ok=True)  # first: half deleted is torn, not damaged
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _removing_torn(path: Path) -> Iterator[None]:
    """CheckpointError where the block cannot write the checkpoint `path`; what there is of it is removed."""
    try:
        with naming(path):
            try:
                yield
            except CheckpointException as error:  # what went wrong on any worker, raised on all
                raise next(iter(error.failures.values()))[0] from None
    except DataError as error:
        shutil.rmtree(path, ignore_errors=True)
        raise CheckpointError(str(error)) from None


def _live_state(sharded: ShardedModel) -> dict[str, Any]:
    weights = {f"weights.{name}": value for name, value in sharded.weights().items()}
    return weights | {f"sums.{name}": value for name, value in sharded.accumulators().items()}


def _empty_like_saved(path: Path, prefix: str) -> dict[str, torch.Tensor]:
    saved = FileSystemReader(path).read_metadata().state_dict_metadata
    return {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)  # type: ignore[union-attr]
        for key, entry in saved.items()
        if key.startswith(prefix)
    }


def read(path: Path, state: dict[str, Any]) -> None:
    """Fill whole tensors from a checkpoint, in this process alone."""
    dcp.load(state, storage_reader=FileSystemReader(path), no_dist=True)


def _belongs_to(name: str, rank: int) -> bool:
    """DCP names a rank's files `__<rank>_<n>.distcp`; the metadata is rank 0's."""
    return name.startswith(f"__{rank}_") or (rank == 0 and not name.startswith("__"))


def _entry(file: Path) -> FileEntry:
    seen = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            seen.update(chunk)
    return FileEntry(size_bytes=file.stat().st_size, sha256=seen.hexdigest())
