"""Checkpoints that are committed or do not exist, and load at any worker count and any sharding.

A checkpoint is a fresh directory: the tensors as torch.distributed.checkpoint writes them, then, fsynced
and last, `manifest.json` with the sha256 of every file. A directory whose files do not match its manifest
is torn and is passed over, and so is an increment (see `train.increments`) whose base is. (DCP's own
`.metadata` is a pickle: it is read only after its sha256 was.) `train.saving` writes them.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pydantic import Field, ValidationError
from torch import nn
from torch.distributed.checkpoint import CheckpointException

from recsys_dist.config import Config, digest
from recsys_dist.errors import CheckpointError
from recsys_dist.models.protocol import Catalogue, model_module, model_schema
from recsys_dist.schema import Schema
from recsys_dist.train import storage
from recsys_dist.train.increments import Base, Touched, put_back
from recsys_dist.train.loop import Loss, Totals
from recsys_dist.train.sharding import ShardedModel, materialise
from recsys_dist.train.storage import AnyPath

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 22
CATALOGUE = "catalogue."  # prefix of what is saved of the catalogue; it stays what it is
ITEM_FEATURE = f"{CATALOGUE}features."

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


class Chain(Config):
    """Runs of which each started from the one before (`warm_start`).

    first   name of the first
    epochs  that the phases of this kind before had finished, up to the checkpoints that were started from
    """

    first: str
    epochs: int


class Manifest(Config):
    """What a checkpoint is of. `epoch` counts finished epochs, `step` finished steps, both of its phase.

    Steps go on from those of the phase that a warm start began with.
    """

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
    chain: Chain | None = None  # None: the run started anew
    rollbacks: int = 0  # how often training went back to a checkpoint before this one, up to it
    plan: dict[str, Any] = Field(default_factory=dict)
    workers: int = 1
    base: Base | None = None  # None: it holds everything

    @property
    def metrics(self) -> dict[str, Any]:
        """The validation metrics of the last finished epoch."""
        return self.history[-1] if self.history else {}


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint: its directory and its manifest."""

    path: AnyPath
    manifest: Manifest

    def as_base(self) -> Base:
        """What increments of it are to say."""
        return Base(name=self.path.name, content=digest(self.manifest.model_dump(include={"files"})))

    def stands_on(self) -> list[AnyPath]:
        """The directories that it is read from: its own, and of an increment the full checkpoint's."""
        base = self.manifest.base
        return [self.path, *([] if base is None else [self.path.with_name(base.name)])]


def load(checkpoint: Checkpoint, sharded: ShardedModel, group: dist.ProcessGroup | None = None) -> None:
    """Restore weights and optimizer states, wherever they live now. Collective, in `group`."""
    dense = _empty_like_saved(checkpoint.path, "dense.")
    if sharded.touched is not None:
        sharded.touched.begin(checkpoint.manifest.base or checkpoint.as_base())
    _fill(checkpoint.path, {**live_state(sharded), **dense}, dist.is_initialized(), sharded.touched, group)
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
    saved = _empty_like_saved(_base_of(path) or path, CATALOGUE)
    read(path, saved)
    features = {k.removeprefix(ITEM_FEATURE): v for k, v in saved.items() if k.startswith(ITEM_FEATURE)}
    return Catalogue(saved["catalogue.positives"], features)


def saved_shapes(path: Path) -> dict[str, torch.Size]:
    """Of each tensor of a checkpoint: `weights.<name>`, `sums.<name>`, `dense.<name>.<slot>`, ..."""
    saved = _saved(_base_of(path) or path)
    return {key: entry.size for key, entry in saved.items()}


def latest_valid(root: AnyPath, warn: Callable[[str], None] = log.warning) -> Checkpoint | None:
    """The checkpoint with the most steps that is whole; warns of each newer one that is not."""
    found: list[Checkpoint] = []
    for path in all_below(root):
        try:
            found.append(Checkpoint(path, read_manifest(path)))
        except CheckpointError as error:
            warn(str(error))
    for checkpoint in sorted(found, key=lambda c: (c.manifest.step, c.manifest.epoch), reverse=True):
        try:
            verify(checkpoint.path)
        except CheckpointError as error:
            warn(str(error))
        else:
            return checkpoint
    return None


def of_epoch(root: AnyPath, epoch: int) -> AnyPath:
    """The whole checkpoint after the best epoch of a phase; CheckpointError where there is none."""
    reason = "there is none"
    for path in storage.listed(
        root, f"epoch-{epoch:04d}-"
    ):  # several where one was torn or damaged, and made anew
        try:
            verify(path)
        except CheckpointError as error:
            reason = str(error)
        else:
            return path
    raise CheckpointError(
        f"epoch {epoch}, the best one, has no whole checkpoint below {str(root)!r}: {reason}; remove the "
        "run's directory, and the command that made it trains it anew"
    )


def all_below(root: AnyPath) -> list[AnyPath]:
    """Directories of checkpoints, torn ones too: of finished epochs, and within one."""
    return storage.listed(root, "epoch-") + storage.listed(root, "step-")


def committed(path: AnyPath) -> bool:
    """Whether a manifest says that it is whole, which may no longer be so."""
    return any(file.name == MANIFEST for file in storage.listed(path))


def verify(path: AnyPath) -> Manifest:
    """The manifest of a whole checkpoint; CheckpointError says what is missing or damaged."""
    manifest = read_manifest(path)
    for name, entry in manifest.files.items():
        file = path / name
        try:
            with storage.reading(file):
                size = file.stat().st_size
                same = size == entry.size_bytes and entry_of(file) == entry
        except FileNotFoundError:
            raise CheckpointError(f"{str(file)!r} is missing, of {entry.size_bytes} bytes") from None
        if size != entry.size_bytes:
            raise CheckpointError(f"{str(file)!r} has {size} bytes instead of {entry.size_bytes}")
        if not same:
            raise CheckpointError(f"{str(file)!r} was changed: its sha256 is not the manifest's")
    if manifest.base is not None:
        base = path.with_name(manifest.base.name)
        try:
            if Checkpoint(base, verify(base)).as_base() != manifest.base:
                raise CheckpointError(f"{str(base)!r} is another one than it was")
        except CheckpointError as error:
            raise CheckpointError(f"{str(path)!r} has only what changed since another: {error}") from None
    return manifest


def _base_of(path: AnyPath) -> AnyPath | None:
    """Of an increment, the directory of the full checkpoint that it goes with."""
    base = read_manifest(path).base
    return None if base is None else path.with_name(base.name)


def read_manifest(path: AnyPath) -> Manifest:
    """Of a committed checkpoint, whose files nobody has looked at."""
    try:
        with storage.reading(path):
            text = (path / MANIFEST).read_bytes()
        return Manifest.model_validate_json(text)
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


def retain(root: AnyPath, keep: Iterable[AnyPath]) -> None:
    """Delete all checkpoints below `root`, torn ones too, but those to `keep`. One worker calls it."""
    kept = {path.name for path in keep}
    for path in all_below(root):
        if path.name not in kept:
            storage.remove(path, first=MANIFEST)  # half deleted is torn, not damaged


def _saved(path: AnyPath) -> dict[str, Any]:
    return storage.reader(path).read_metadata().state_dict_metadata


def _empty_like_saved(path: AnyPath, prefix: str) -> dict[str, torch.Tensor]:
    return {key: _empty(entry) for key, entry in _saved(path).items() if key.startswith(prefix)}


def _empty(entry: Any) -> torch.Tensor:
    return torch.empty(entry.size, dtype=entry.properties.dtype)


def read(path: AnyPath, state: dict[str, Any]) -> None:
    """Fill whole tensors from a checkpoint, in this process alone."""
    _fill(path, state, together=False)


def _fill(
    path: AnyPath,
    state: dict[str, Any],
    together: bool,
    touched: Touched | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Fill live tensors, collectively where `together`, and mark in `touched` which rows an increment has."""
    base, saved = _base_of(path), _saved(path)
    there = {key: value for key, value in state.items() if base is None or key in saved}
    for at, part in ((path, there), (base, {k: v for k, v in state.items() if k not in there})):
        if at is not None and part:
            dcp.load(part, storage_reader=storage.reader(at), process_group=group, no_dist=not together)

    def piece(names: list[str]) -> dict[str, torch.Tensor]:
        tensors = {name: _empty(saved[name]) for name in names}
        dcp.load(tensors, storage_reader=storage.reader(path), no_dist=True)
        return tensors

    if base is not None:
        put_back(state, saved, piece, touched)


def live_state(sharded: ShardedModel) -> dict[str, Any]:
    """Weights and the tables' optimizer state, as they are named in a checkpoint; views of them."""
    weights = {f"weights.{name}": value for name, value in sharded.weights().items()}
    return weights | {f"sums.{name}": value for name, value in sharded.accumulators().items()}


def entry_of(file: AnyPath) -> FileEntry:
    """What a manifest says of a file."""
    seen = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            seen.update(chunk)
    return FileEntry(size_bytes=file.stat().st_size, sha256=seen.hexdigest())
