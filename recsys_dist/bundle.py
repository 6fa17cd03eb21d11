"""Bundle: one immutable version of everything that must agree, and all that serving loads.

`manifest.py` says which file holds what. No pickle: safetensors, Parquet, JSON, and faiss' own format, which
is read only after its sha256 was checked.
"""

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.numpy
import safetensors.torch
import torch
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingCollection

from recsys_dist import card, index, manifest
from recsys_dist.data.encoders import Encoders
from recsys_dist.data.entities import Entities
from recsys_dist.data.output import naming, sole_writer, write_parquet
from recsys_dist.errors import BundleError
from recsys_dist.index import Index, Ivf
from recsys_dist.manifest import CARD, GOLDEN, Manifest
from recsys_dist.models.protocol import Catalogue, Task, model_module
from recsys_dist.schema import Schema

log = logging.getLogger(__name__)

_UNFINISHED = ".unfinished"
_ITEM_VECTORS = "item_vectors"
_INDEX = "index.faiss"

Golden = Callable[["Bundle"], list[dict[str, Any]]]
Check = Callable[["Bundle"], None]  # BundleError for what is to be written anew


@dataclass(frozen=True)
class Served:
    """A model in eval mode, and the fitted schema that it reads.

    Of a recall model only the user side can be computed: `Bundle.item_vectors` stands for the other, and
    the item side's tables are left out.
    """

    model: nn.Module
    schema: Schema


@dataclass(frozen=True)
class Bundle:
    """What `open` gives; I rows of the item table, row 0 unknown.

    encoders      fitted on the whole data schema, `encoders.schema`
    users, items  attributes that features read, and of items a title or name where there is one
    positives     [I] int64: how often each item was wanted before the test days
    item_vectors  [I, D] float32
    events        canonical log columns, sorted by `data.examples.sort_events`: of each user the newest
                  events that a sequence feature can still see (`data.recent`)
    seen          `user_id`, `items` (list<int32>): distinct item rows that each user was shown
    golden        requests with their answers, for the code that serves to replay
    """

    path: Path
    manifest: Manifest
    encoders: Encoders
    users: Entities
    items: Entities
    recall: Served
    ranking: Served
    positives: np.ndarray
    item_vectors: np.ndarray
    index: Index
    events: pa.Table
    seen: pa.Table
    golden: list[dict[str, Any]]

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Load a bundle after checking every file; BundleError names what does not agree."""
        directory = Path(path)
        facts = manifest.verify(directory)
        encoders = Encoders.load(directory / "encoders")
        _agree(directory, "schema_digest", facts.schema_digest, encoders.schema.digest())
        _agree(directory, "vocabulary_digest", facts.vocabulary_digest, encoders.digest())
        positives = pq.read_table(directory / "catalogue.parquet")["positives"].to_numpy()
        vectors = safetensors.numpy.load_file(directory / f"{_ITEM_VECTORS}.safetensors")[_ITEM_VECTORS]
        rows = encoders.schema.item_id.rows
        _agree(directory, "rows of the item table", rows, len(positives) + 1)
        _agree(directory, "rows of the item table", rows, len(vectors))
        positives = np.r_[0, positives]
        return cls(
            path=directory,
            manifest=facts,
            encoders=encoders,
            users=_read_entities(directory, "user_id"),
            items=_read_entities(directory, "item_id"),
            recall=_load(directory, facts, "recall", encoders.schema, positives),
            ranking=_load(directory, facts, "ranking", encoders.schema, positives),
            positives=positives,
            item_vectors=vectors,
            index=index.load(directory / _INDEX, vectors) if _INDEX in facts.files else index.exact(vectors),
            events=pq.read_table(directory / "events.parquet"),
            seen=pq.read_table(directory / "seen.parquet"),
            golden=json.loads((directory / GOLDEN).read_text()) if GOLDEN in facts.files else [],
        )

    @property
    def item_ids(self) -> pa.Array:
        """Strings; row r >= 1 of the item table is `item_ids[r - 1]`."""
        return self.encoders.vocabularies[self.encoders.schema.item_id.name].values

    @cached_property
    def popular(self) -> np.ndarray:
        """Int32 item rows from 1, by falling number of positives, ties by row."""
        return (1 + np.argsort(-self.positives[1:], kind="stable")).astype(np.int32)

    def save(self, root: Path, golden: Golden | None = None, check: Check | None = None) -> Self:
        """Write `root`/<version> in full, or not at all, and return it as `open` would.

        It is opened before it gets its name, and answers `golden`'s requests. The same content again
        leaves what is there, unless that is damaged or fails `check`. Raises BundleError where the parts do
        not agree.
        """
        with sole_writer(root), naming(root):
            for stale in root.glob(f".*{_UNFINISHED}"):  # of a process that was killed
                shutil.rmtree(stale)
            fresh = root / f".{uuid.uuid4().hex[:8]}{_UNFINISHED}"
            fresh.mkdir()
            try:
                return self._commit(fresh, root, golden, check)
            finally:
                shutil.rmtree(fresh, ignore_errors=True)

    def _commit(self, fresh: Path, root: Path, golden: Golden | None, check: Check | None) -> Self:
        self._write(fresh)
        facts = self.manifest.sealed(manifest.entries(fresh))
        path = root / facts.version
        if path.exists():
            try:
                there = type(self).open(path)
                if check is not None:
                    check(there)
                if there.manifest.metrics == self.manifest.metrics:
                    return there
                log.warning("bundle %r has other figures; writing it anew", str(path))
            except BundleError as error:
                log.warning("%s; writing it anew", error)
        facts.save(fresh)
        opened = type(self).open(fresh)
        answers = golden(opened) if golden else self.golden
        (fresh / GOLDEN).write_text(json.dumps(answers, indent=1, allow_nan=False) + "\n")
        ranker: Any = opened.ranking.model
        calibration = getattr(ranker, "calibration", None)  # which a model from elsewhere need not have
        calibrated = calibration is not None and calibration.changes
        (fresh / CARD).write_text(card.text(facts, ranker.predicts, calibrated))
        facts = facts.sealed(manifest.entries(fresh))
        facts.save(fresh)
        _sync(fresh)
        if path.exists():  # whoever serves it must find it as long as can be
            shutil.rmtree(path)
        fresh.rename(path)
        _sync(root, below=False)
        return replace(opened, path=path, manifest=facts, golden=answers)

    def _write(self, directory: Path) -> None:
        self.encoders.save(directory / "encoders")
        write_parquet(self.users.attributes, directory / "users.parquet")
        write_parquet(self.items.attributes, directory / "items.parquet")
        catalogue = pa.table({"item_id": self.item_ids, "positives": self.positives[1:]})
        write_parquet(catalogue, directory / "catalogue.parquet")
        write_parquet(self.events, directory / "events.parquet")
        write_parquet(self.seen, directory / "seen.parquet")
        safetensors.numpy.save_file(
            {_ITEM_VECTORS: self.item_vectors}, directory / f"{_ITEM_VECTORS}.safetensors"
        )
        if isinstance(self.index, Ivf):
            self.index.save(directory / _INDEX)
        for task, served in (("recall", self.recall), ("ranking", self.ranking)):
            without = tuple(f"{name}." for name in _item_side(served)) if task == "recall" else ()
            weights = {n: w.contiguous() for n, w in served.model.state_dict().items()}
            kept = {name: weight for name, weight in weights.items() if not name.startswith(without)}
            safetensors.torch.save_file(kept, directory / f"{task}.safetensors")


def _load(directory: Path, facts: Manifest, task: Task, schema: Schema, positives: np.ndarray) -> Served:
    module = model_module(facts.models[task]["name"])
    _agree(directory, f"task of model {facts.models[task]['name']!r}", task, module.Model.task)
    cfg = module.Config.parse(facts.models[task])
    if task == "ranking":
        schema = Schema.parse({**schema.model_dump(), "ranking_label": facts.labels[task][0]})
    read = module.Model.inputs(schema, cfg)
    model: nn.Module = module.Model(cfg, read, Catalogue(torch.from_numpy(positives)))
    served = Served(model, read)
    if task == "recall":
        for name in _item_side(served):
            parent, _, last = name.rpartition(".")
            delattr(model.get_submodule(parent), last)
    weights = safetensors.torch.load_file(directory / f"{task}.safetensors")
    try:  # `assign`: the tables stood on the "meta" device until here
        model.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise BundleError(f"bundle {str(directory)!r}: {task}.safetensors: {reason}") from None
    model.eval().requires_grad_(False)
    return served


def _item_side(served: Served) -> list[str]:
    """The embedding collections of a recall model in which items alone are looked up."""
    schema = served.schema
    of_items = {feature.name for feature in schema.features if schema.sides(feature) == {"item"}}
    found = []
    for name, module in served.model.named_modules():
        if isinstance(module, EmbeddingBagCollection):
            configs: list[Any] = module.embedding_bag_configs()
        elif isinstance(module, EmbeddingCollection):
            configs = module.embedding_configs()
        else:
            continue
        if all(set(config.feature_names) <= of_items for config in configs):
            found.append(name)
    return found


def _read_entities(directory: Path, key: str) -> Entities:
    table = pq.read_table(directory / f"{key.removesuffix('_id')}s.parquet").combine_chunks()
    return Entities(pa.concat_arrays(table[key].chunks or [pa.array([], pa.string())]), table)


def _agree(directory: Path, what: str, said: object, found: object) -> None:
    if said != found:
        raise BundleError(f"bundle {str(directory)!r}: {what} is {said!r} here and {found!r} there")


def _sync(directory: Path, below: bool = True) -> None:
    """Wait until the disk has it: the directory, and with `below` everything in it."""
    for path in (directory, *(directory.rglob("*") if below else ())):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
