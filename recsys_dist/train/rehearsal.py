"""One step of a model without its tables: what it asks of them, and what its layers keep meanwhile.

Its collections of tables answer with zeros, so that tables which no machine holds can be planned with.
"""

import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from torchrec import EmbeddingBagCollection, EmbeddingCollection, JaggedTensor, KeyedJaggedTensor, KeyedTensor
from torchrec.modules.embedding_configs import BaseEmbeddingConfig
from torchrec.modules.embedding_modules import get_embedding_names_by_table

from recsys_dist.batch import Batch
from recsys_dist.models.recall import GlobalRows


@dataclass(frozen=True)
class Rehearsed:
    """What a worker's step on so many `rows` comes to.

    ids         table -> how many are looked up in it
    vectors     table -> how many it gives: one per id, or one per bag of them
    live_bytes  the most that the tensors made by the forward and the backward pass take at a time, what the
                tables answer and its gradient included
    """

    rows: int
    ids: Mapping[str, int]
    vectors: Mapping[str, int]
    live_bytes: int

    @property
    def ids_per_row(self) -> dict[str, float]:
        """Table -> how many ids of a row of data are looked up in it."""
        return {table: count / self.rows for table, count in self.ids.items()}


def rehearse(loss: nn.Module, batch: Batch, workers: int) -> Rehearsed:
    """The step of one of so many workers on `batch`; `loss` is of no other use afterwards."""
    ids: Counter[str] = Counter()
    vectors: Counter[str] = Counter()
    for module in list(loss.modules()):
        if isinstance(module, EmbeddingBagCollection):
            module.forward = partial(_bags, module, ids, vectors)
        elif isinstance(module, EmbeddingCollection):
            module.forward = partial(_each, module, ids, vectors)
        for name, child in module.named_children():
            if type(child) is GlobalRows:
                setattr(module, name, _OfAll(workers))
    for weight in loss.parameters():
        if not weight.is_meta:
            weight.grad = torch.zeros_like(weight)  # a run keeps them from step to step
    with torch.random.fork_rng(devices=[]), _Live() as live:
        (loss(batch, 0) * batch.weight).sum().backward()
    return Rehearsed(batch.rows, ids, vectors, live.most)


class _OfAll(nn.Module):
    """`GlobalRows` of so many workers, who all have the same."""

    def __init__(self, workers: int) -> None:
        super().__init__()
        self.workers = workers

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return torch.cat([rows] * self.workers)


class _Live(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are still there: now, and at `most`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for storage in _storages((args, kwargs)):
            self._known.setdefault(storage, True)  # it was there before
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            if storage not in self._known:
                self._known[storage] = True
                self._add(storage.nbytes())
                weakref.finalize(storage, self._add, -storage.nbytes())
        return made

    def _add(self, count: int) -> None:
        self.now += count
        self.most = max(self.most, self.now)


def _storages(tree: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _asked(
    tables: list[Any], ids: Counter[str], sparse: KeyedJaggedTensor
) -> list[tuple[BaseEmbeddingConfig, JaggedTensor]]:
    """(table, its feature's ids) in the order in which a collection answers; all are counted."""
    found = sparse.to_dict()
    asked = [(table, found[feature]) for table in tables for feature in table.feature_names]
    for table, jagged in asked:
        ids[table.name] += len(jagged.values())
    return asked


def _bags(
    module: EmbeddingBagCollection, ids: Counter[str], vectors: Counter[str], sparse: KeyedJaggedTensor
) -> KeyedTensor:
    tables = module.embedding_bag_configs()
    asked = _asked(tables, ids, sparse)
    for table, jagged in asked:
        vectors[table.name] += len(jagged.lengths())
    widths = [table.embedding_dim for table, _ in asked]
    names = [name for of_table in get_embedding_names_by_table(tables) for name in of_table]
    return KeyedTensor(names, widths, torch.zeros(sparse.stride(), sum(widths), requires_grad=True))


def _each(
    module: EmbeddingCollection, ids: Counter[str], vectors: Counter[str], sparse: KeyedJaggedTensor
) -> dict[str, JaggedTensor]:
    tables = module.embedding_configs()
    asked = _asked(tables, ids, sparse)
    names = [name for of_table in get_embedding_names_by_table(tables) for name in of_table]
    answers = {}
    for name, (table, jagged) in zip(names, asked, strict=True):
        vectors[table.name] += len(jagged.values())
        rows = torch.zeros(len(jagged.values()), table.embedding_dim, requires_grad=True)
        answers[name] = JaggedTensor(rows, lengths=jagged.lengths())
    return answers
