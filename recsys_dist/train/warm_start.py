"""A model that starts from what a former run learned, on other data, with other features or other tables.

Rows of a table go with the values that they stand for: those that both vocabularies have are taken, with
their optimizer's state, wherever they lie in either; new values start as they always do. Dense weights are
taken, with Adam's state, where name and shape are what they were. A phase starts from the run's same phase:
what chooses the epochs has learned nothing from days that it had not.

R rows of a table
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recsys_dist.config import load_yaml
from recsys_dist.data.prepared import Prepared
from recsys_dist.data.vocab import UNKNOWN
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.feature_kinds import Cross, IdFeature
from recsys_dist.models.protocol import model_module, model_schema
from recsys_dist.models.ranking import WIDE, Fields
from recsys_dist.schema import Schema
from recsys_dist.train import checkpoint as checkpoints
from recsys_dist.train.checkpoint import Chain
from recsys_dist.train.loop import Loss
from recsys_dist.train.pieces import local
from recsys_dist.train.placement import tables_of
from recsys_dist.train.pretrained import checkpoint_of
from recsys_dist.train.sharding import ShardedModel

_NEW = -1  # of a row that the former table has not
_MOST = 0.9
Stretches = list[tuple[str, int, int]]  # (feature, its first row, its rows) of a table


@dataclass(frozen=True)
class Former:
    """A finished run: its checkpoint, and the data that its rows are numbered by."""

    checkpoint: Path
    schema: Schema
    prepared: Prepared
    tables: Mapping[str, Stretches]

    @classmethod
    def open(cls, run: str, phase: str) -> "Former":
        """ConfigError where `run` is no finished run, or its data are not there any more."""
        path = checkpoint_of(run, phase, "warm_start")
        manifest = checkpoints.verify(path)
        data = load_yaml(Path(run) / "config.yaml")["data"]
        try:
            prepared = Prepared.open(data)
        except DataError as error:
            raise ConfigError(
                f"warm_start={run!r}: whose rows are whose is in the data that it was trained on: {error}"
            ) from None
        if prepared.manifest.vocabulary_digest != manifest.vocabulary_digest:
            raise ConfigError(
                f"warm_start={run!r} was trained on data that are not in {data!r} any more: the vocabulary "
                f"there is {prepared.manifest.vocabulary_digest}, the run's {manifest.vocabulary_digest}. "
                "Prepare each day's data in a directory of its own"
            )
        module = model_module(manifest.model["name"])
        cfg = module.Config.parse(manifest.model)
        schema = model_schema(cfg, manifest.data_schema, manifest.label)
        loss = Loss(module.Model(cfg, schema, checkpoints.saved_catalogue(path)))
        return cls(path, schema, prepared, stretches(loss, schema, tables_of(loss)))


def goes_on_from(run: str, phase: str = "refit") -> tuple[int, Chain]:
    """The step that a phase of `run` ended with, and the chain of runs that goes on there.

    ConfigError where `run` is no finished run.
    """
    manifest = checkpoints.read_manifest(checkpoint_of(run, phase, "warm_start"))
    before = manifest.chain or Chain(first=Path(run).name, epochs=0)
    return manifest.step, Chain(first=before.first, epochs=before.epochs + manifest.epoch)


def start(sharded: ShardedModel, schema: Schema, prepared: Prepared, run: str, phase: str) -> list[str]:
    """Give the model what it has in common with `run`; says in a line per table, and one of dense weights.

    Each worker takes the rows that live with it; it holds one former table at a time. ConfigError where
    there is nothing in common.
    """
    former = Former.open(run, phase)
    saved = checkpoints.saved_shapes(former.checkpoint)
    sums, told = sharded.accumulators(), []
    mine = stretches(sharded.inner(), schema, sharded.tables)
    for name, weight in sharded.weights().items():
        if name not in sharded.tables:
            continue
        table, size = sharded.tables[name], saved.get(f"weights.{name}")
        anew = _why_anew(table, size, known=name in mine.keys() & former.tables.keys())
        if anew or size is None:
            told.append(f"table {table.name!r} starts anew: {anew}")
            continue
        there = (former.schema, former.prepared)
        rows_R = row_map(mine[name], former.tables[name], (schema, prepared), there)
        _take(former.checkpoint, f"weights.{name}", weight, rows_R, size)
        state = saved.get(f"sums.{name}")  # another rule has none, or of another form
        if name in sums and state is not None and state[1:] == sums[name].size()[1:]:
            _take(former.checkpoint, f"sums.{name}", sums[name], rows_R, state)
        taken = int((rows_R != _NEW).sum())
        told.append(f"table {table.name!r}: {taken:,} of {len(rows_R):,} rows taken, {size[0]:,} were there")
    taken_dense, new = _take_dense(sharded, former.checkpoint, saved)
    told.append(
        f"{len(taken_dense)} of {len(taken_dense) + len(new)} dense weights taken"
        + (f"; new: {', '.join(new)}" if new else "")
    )
    if not taken_dense and not any("taken" in line for line in told[:-1]):
        raise ConfigError(f"warm_start={run!r} has no weight in common with this model: {'; '.join(told)}")
    return told


def _why_anew(table: Any, size: torch.Size | None, known: bool) -> str:
    if size is None:
        return "there was none"
    if size[1] != table.embedding_dim:
        return f"its dimension was {size[1]}"
    return "" if known else "its rows are of no feature"


def stretches(model: Any, schema: Schema, tables: Mapping[str, Any]) -> dict[str, Stretches]:
    """Name of each table's weight -> what its rows are of: one feature's, or the wide table's, in order.

    Tables of a model from elsewhere whose rows are of no feature are left out.
    """
    ids = {feature.name: feature for feature in schema.ids}
    wide = next((m.wide_rows for m in model.modules() if isinstance(m, Fields) and m.wide_rows), {})
    found: dict[str, Stretches] = {}
    for name, table in tables.items():
        if table.feature_names == [WIDE]:
            ends = [*wide.values(), table.num_embeddings][1:]
            parts = zip(wide.items(), ends, strict=True)
            found[name] = [(feature, first, end - first) for (feature, first), end in parts]
        elif (feature := ids.get(table.feature_names[0])) is not None:
            found[name] = [(schema.table(feature), 0, table.num_embeddings)]
    return found


def row_map(
    now: Stretches, then: Stretches, here: tuple[Schema, Prepared], there: tuple[Schema, Prepared]
) -> np.ndarray:
    """[R] int64 the former row of each row of a table, -1 where it is new."""
    found, before = [], {feature: (first, rows) for feature, first, rows in then}
    for feature, _, rows in now:
        if feature not in before:
            found.append(np.full(rows, _NEW))
            continue
        first, former_rows = before[feature]
        same = _rows_of_feature(feature, rows, former_rows, here, there)
        found.append(np.where(same == _NEW, _NEW, same + first))
    return np.concatenate(found)


def _rows_of_feature(
    feature: str, rows: int, former_rows: int, here: tuple[Schema, Prepared], there: tuple[Schema, Prepared]
) -> np.ndarray:
    now, then = here[1].encoders.vocabularies, there[1].encoders.vocabularies
    if feature in now and feature in then:
        known = then[feature].lookup(now[feature].values).astype(np.int64)
        return np.concatenate([[UNKNOWN], np.where(known == UNKNOWN, _NEW, known)])
    identity, anew = np.arange(rows), np.full(rows, _NEW)
    if feature in now or feature in then or rows != former_rows:
        return anew  # hashed once and listed once, or hashed into another number of rows
    of = here[0][feature]
    if type(of) is not type(there[0][feature]):
        return anew
    if isinstance(of, Cross):  # hashed from the rows of its parts
        if of != there[0][feature]:
            return anew
        parts = [(_size(here[0], name), _size(there[0], name), name) for name in of.of]
        alike = [_numbered_alike(_rows_of_feature(name, r, f, here, there)) for r, f, name in parts]
        return identity if all(alike) else anew
    return identity


def _numbered_alike(former_R: np.ndarray) -> bool:
    """Whether the values that were there have the rows that they had, but for a few, as `former` data have.

    Crosses of those few, and of new values, start from whatever shares their bucket.
    """
    former_rows, rows = former_R[1:], np.arange(1, len(former_R))
    known = former_rows != _NEW
    return bool(known.any()) and float(np.mean(former_rows[known] == rows[known])) >= _MOST


def _size(schema: Schema, name: str) -> int:
    feature = schema[name]
    assert isinstance(feature, IdFeature) and feature.rows is not None, "of a fitted schema"
    return feature.rows


@torch.no_grad()
def _take(checkpoint: Path, key: str, into: Any, rows_R: np.ndarray, size: torch.Size) -> None:
    """Copy former rows of a saved tensor into the rows that stand for the same, where they live here."""
    former = torch.empty(size)
    checkpoints.read(checkpoint, {key: former})
    for tensor, offsets in local(into):
        rows = torch.from_numpy(rows_R[offsets[0] : offsets[0] + len(tensor)])
        known = rows != _NEW
        values = former[rows[known]]
        if values.dim() > 1:
            values = values[:, offsets[1] : offsets[1] + tensor.shape[1]]
        tensor[known] = values.to(tensor)


def _take_dense(
    sharded: ShardedModel, checkpoint: Path, saved: Mapping[str, torch.Size]
) -> tuple[list[str], list[str]]:
    """Names of the dense weights that are taken, and of those that are new."""
    dense = {name: w for name, w in sharded.weights().items() if name not in sharded.tables}
    taken = {name: w for name, w in dense.items() if saved.get(f"weights.{name}") == w.shape}
    if taken:
        checkpoints.read(checkpoint, {f"weights.{name}": weight for name, weight in taken.items()})
    states = {
        key: torch.empty(size)
        for key, size in saved.items()
        if key.startswith("dense.") and key.removeprefix("dense.").rpartition(".")[0] in taken
    }
    if states:
        checkpoints.read(checkpoint, states)
    sharded.optimizers.load_state({key.removeprefix("dense."): value for key, value in states.items()})
    return list(taken), [name.removeprefix("model.") for name in dense if name not in taken]
