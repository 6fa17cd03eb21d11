"""A bundle on the test days of other, later data: what a champion is worth beside its challenger.

Its features are made as it would serve: by its own vocabularies, statistics and attributes, from the events
of the log. What it does not know it does not find.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from recsys_dist.bundle import Bundle, Served
from recsys_dist.data import stages
from recsys_dist.data.collate import collate
from recsys_dist.data.examples import World, features, user_states
from recsys_dist.data.logs import LogSpec
from recsys_dist.data.prepared import Prepared
from recsys_dist.data.split import SPLITS, Split
from recsys_dist.errors import DataError
from recsys_dist.evaluate.trained import EvaluateConfig
from recsys_dist.metrics import RankingState, RetrievalState
from recsys_dist.train.validate import csr, user_keys


def evaluate_bundle(
    bundle: Bundle, prepared: Prepared, cfg: EvaluateConfig
) -> dict[str, dict[str, dict[str, float]]]:
    """`{"ranking": {"model": metrics}, "recall": {"model": metrics}}` on the days `cfg.split` of `prepared`,
    recall among items not seen before. DataError where the log lacks a column that the bundle reads."""
    split = Split.parse(prepared.manifest.config["split"])
    world = World(bundle.encoders, bundle.users, bundle.items)
    ranked, found = [], []
    for events in _by_user(bundle, prepared):
        shown = (split.assign(events["date"]) == SPLITS.index(cfg.split)) & ~np.asarray(events["history"])
        ranked.append(_ranked(bundle.ranking, events, world, np.flatnonzero(shown), cfg.batch_rows))
        states = user_states(events, world, split, cfg.split)
        if len(states):
            found.append(_found(bundle, states, max(cfg.ks)))
    if not found:
        raise DataError(f"no user wanted an item in split {cfg.split!r} of {str(prepared.path)!r}")
    logits, labels, users = (np.concatenate(parts) for parts in zip(*ranked, strict=True))
    return {
        "ranking": {"model": RankingState(logits, labels, users).compute()},
        "recall": {"model": found[0].merge(*found[1:]).compute(cfg.ks)},
    }


def _by_user(bundle: Bundle, prepared: Prepared) -> Iterator[pa.Table]:
    """The canonical log, a group of users at a time."""
    needed = LogSpec.from_schema(bundle.encoders.schema).required
    for bucket in stages.bucket_numbers(prepared.path):
        events = stages.read_bucket(prepared.path, bucket)
        missing = [name for name in needed if name not in events.column_names]
        if missing:
            raise DataError(
                f"the log in {str(prepared.path)!r} has no {missing[0]!r}, which the bundle reads"
            )
        yield events


def _ranked(
    served: Served, events: pa.Table, world: World, of: np.ndarray, batch_rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, labels and users of the events at positions `of`."""
    rows = pa.table(features(events, world, of))
    logits = [np.empty(0, np.float32)]
    with torch.inference_mode():
        for start in range(0, len(rows), batch_rows):
            batch = collate(rows.slice(start, batch_rows), served.schema)
            logits.append(served.model(batch).numpy())
    asked = events.select(["user_id", served.schema.ranking_label]).take(pa.array(of))
    labels = pc.cast(asked[served.schema.ranking_label], pa.float32()).to_numpy()
    return np.concatenate(logits), labels, user_keys(asked["user_id"])


def _found(bundle: Bundle, states: pa.Table, k: int) -> RetrievalState:
    with torch.inference_mode():
        vectors = bundle.recall.model(collate(states, bundle.recall.schema)).numpy()
    offsets, seen = csr(states["seen"])
    top, _ = bundle.index.search(vectors, k, np.split(seen, offsets[1:-1]))
    return RetrievalState.of(top, *csr(states["truth"]), len(bundle.item_vectors))
