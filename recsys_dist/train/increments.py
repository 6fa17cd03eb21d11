"""Checkpoints of changed rows alone: which rows were looked up since the last full one, and reading them.

A gradient reaches a row by a lookup alone, so a row that was not looked up is what the full checkpoint says.
(Adagrad's sums do not tell: a small square leaves a large sum as it is.) Tables that are stepped in whole,
which are data-parallel ones, FTRL's and those with weight decay, are always saved in whole. An increment
holds all rows since the full checkpoint, so that reading takes two checkpoints, never a chain of them.

R rows of a piece of a table, T of them touched
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import nn

from recsys_dist.config import Config
from recsys_dist.train.pieces import copied, local, pieces

# Names in an increment, where a full checkpoint has `weights.<name>` and `sums.<name>`: for each piece
# `rows.<its first row>.<its first column>.<name>` [T] numbers in the whole table, and, named likewise,
# `weights` and `sums` [T, columns] or [T] of those rows.
_ROWS, _PARTS = "rows", ("weights", "sums")


class Base(Config):
    """The full checkpoint that an increment goes with: its directory's name, and a digest of its files."""

    name: str
    content: str


class Touched:
    """Which of the rows that live here were looked up since `base` was saved or loaded.

    base     None: there is none, and the next checkpoint is full. What changes rows otherwise than by a step
             after their lookup has to set it to None
    at_most  share of a full checkpoint's bytes; what would take more is saved in full

    `weights` are those to watch and `tables` their TorchRec configs, by name; `lookups` are
    `ShardedModel.lookups()`. It takes a byte a row.
    """

    def __init__(
        self, weights: Mapping[str, Any], tables: Mapping[str, Any], lookups: list[nn.Module], at_most: float
    ) -> None:
        self.base: Base | None = None
        self.at_most = at_most
        # name -> first row of a piece -> [R] 0 or 1; pieces of other columns of the same rows share it
        self._marks: dict[str, dict[int, torch.Tensor]] = {name: {} for name in weights}
        for name, weight in weights.items():
            for tensor, (row, _), (rows, _) in pieces(weight, tables[name]):
                marks_R = torch.zeros(rows, dtype=torch.uint8, device=tensor.device)
                self._marks[name].setdefault(row, marks_R)
        names, seen = {tables[name].name: name for name in weights}, set()
        for kernel in (each for lookup in lookups for each in getattr(lookup, "_emb_modules", ())):
            watched = [t for t in kernel._config.embedding_tables if t.name in names]  # all of it, or none
            marks = [self._marks[names[t.name]][t.local_metadata.shard_offsets[0]] for t in watched]
            seen |= {id(marks_R) for marks_R in marks}
            keys = [marks_R for marks_R, t in zip(marks, watched, strict=True) for _ in t.feature_names]
            if keys:
                kernel.register_forward_pre_hook(_marking(keys))
        assert seen >= {id(marks_R) for marks_R in self._all() if len(marks_R)}, (
            "rows whose lookups are not seen are lost"
        )

    def begin(self, base: Base | None) -> None:
        """From now on. `base` may also be told once it is committed."""
        self.base = base
        for marks_R in self._all():
            marks_R.zero_()

    def sizes(self, state: Mapping[str, Any]) -> tuple[int, int]:
        """Bytes of this worker's part of the full `state`, and of what an increment would hold of it."""
        whole = changed = 0
        for key, value in state.items():
            marks = self._of(key)
            for tensor, offsets in local(value):
                whole += tensor.nbytes
                if marks is None:
                    changed += tensor.nbytes
                else:
                    changed += tensor[:1].nbytes * int(marks[offsets[0]].count_nonzero())
        return whole, changed

    def changed(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A copy, in the host's memory, of what an increment holds of the full `state`."""
        found: dict[str, Any] = {}
        for key, value in state.items():
            marks = self._of(key)
            if marks is None:
                found[key] = copied(value)
                continue
            part, _, name = key.partition(".")
            for tensor, offsets in local(value):
                rows_T = marks[offsets[0]].nonzero().squeeze(1)
                if len(rows_T):
                    at = f"{offsets[0]}.{(*offsets, 0)[1]}.{name}"
                    found[f"{part}.{at}"] = tensor.detach().index_select(0, rows_T).cpu()
                    found[f"{_ROWS}.{at}"] = rows_T.cpu() + offsets[0]
        return found

    def mark(self, name: str, rows_T: torch.Tensor | None = None) -> None:
        """Those of a table's rows, or all, that live here; `name` is its weight's."""
        for row, marks_R in self._marks.get(name, {}).items():
            if rows_T is None:
                marks_R.fill_(1)
                continue
            here = (rows_T >= row) & (rows_T < row + len(marks_R))
            marks_R[(rows_T[here] - row).to(marks_R.device)] = 1

    def _all(self) -> list[torch.Tensor]:
        return [marks_R for pieces_of in self._marks.values() for marks_R in pieces_of.values()]

    def _of(self, key: str) -> dict[int, torch.Tensor] | None:
        part, _, name = key.partition(".")
        return self._marks.get(name) if part in _PARTS else None


def _marking(of_keys: list[torch.Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def mark(_kernel: nn.Module, inputs: tuple[Any, ...]) -> None:
        ids, ends = inputs[0].values().long(), inputs[0].offset_per_key()
        for marks_R, start, end in zip(of_keys, ends[:-1], ends[1:], strict=True):
            marks_R.index_fill_(0, ids[start:end], 1)  # of numpy's and torch's ways the fastest, on CPU

    return mark


@torch.no_grad()
def put_back(
    state: Mapping[str, Any],
    saved: Collection[str],
    read: Callable[[list[str]], dict[str, torch.Tensor]],
    touched: Touched | None,
) -> None:
    """Write an increment's rows into a `state` that has its base's, and mark them in `touched`.

    saved  all names in the increment
    read   gives the tensors of some of them
    """
    for key in (key for key in saved if key.startswith(f"{_ROWS}.")):
        at = key.removeprefix(f"{_ROWS}.")
        _, column, name = at.split(".", 2)
        parts = [part for part in _PARTS if f"{part}.{name}" in state and f"{part}.{at}" in saved]
        if not parts:
            continue
        piece = read([key, *(f"{part}.{at}" for part in parts)])
        for part in parts:
            for tensor, offsets in local(state[f"{part}.{name}"]):
                _put(tensor, offsets, piece[key], piece[f"{part}.{at}"], int(column))
        if touched is not None:
            touched.mark(name, piece[key])
    if touched is not None:  # what was saved in whole, by workers that did not watch it, may all have changed
        for key in saved:
            touched.mark(key.removeprefix("weights."))


def _put(
    tensor: torch.Tensor, offsets: list[int], rows_T: torch.Tensor, values: torch.Tensor, column: int
) -> None:
    """Those rows and columns of a changed piece, which begins at `column`, that a live one has too."""
    here = (rows_T >= offsets[0]) & (rows_T < offsets[0] + len(tensor))
    rows, values = (rows_T[here] - offsets[0]).to(tensor.device), values[here].to(tensor)
    if tensor.dim() == 1:
        tensor[rows] = values
        return
    first = max(column, offsets[1])
    last = min(column + values.shape[1], offsets[1] + tensor.shape[1])
    if first < last:
        tensor[rows, first - offsets[1] : last - offsets[1]] = values[:, first - column : last - column]
