"""Recall on held-out days: the whole catalogue ranked for every user, exactly, beside two baselines.

U users, I rows of the item table, K longest cut
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import scipy.sparse as sp
import torch

from recsys_dist.baselines import history_scores
from recsys_dist.data.collate import collate
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import DataError
from recsys_dist.evaluate.ranking import item_positives
from recsys_dist.evaluate.trained import EvaluateConfig, Trained
from recsys_dist.metrics import RetrievalState, intervals, retrieval_replicates
from recsys_dist.models import popularity
from recsys_dist.train.item_cosine import similarity
from recsys_dist.train.validate import csr, item_vectors, scored, top_items

Score = Callable[[pa.Table], torch.Tensor]  # users -> [U, I], written over by the caller
_BLOCK_SCORES = 1 << 23  # users are ranked in blocks of about this many scores (32 MB)


def evaluate_recall(prepared: Prepared, trained: Trained, cfg: EvaluateConfig) -> dict[str, Any]:
    """Rank the catalogue for the users of `users/<split>` and count what they went on to want.

    Returns split, users, pairs, and for each of `model`, `popularity` and
    `item_cosine` the metrics of RetrievalState with 95 % `intervals`, twice: `unseen` leaves out items
    the user was shown before the split, `all` does not. `model_minus_popularity` has the intervals of
    the difference among unseen items. `skipped` says which baseline was not computed, and why.
    """
    positives_I = item_positives(prepared, cfg.split)
    popular = popularity.ranks(torch.from_numpy(positives_I))
    scorers: dict[str, Score] = {
        "model": partial(_by_model, trained, item_vectors(trained.model)),
        "popularity": lambda users: popular.repeat(len(users), 1),
    }
    result: dict[str, Any] = {"split": cfg.split, "skipped": {}}
    if most := cfg.item_pairs // len(positives_I):
        scorers["item_cosine"] = partial(_by_cosine, similarity(prepared, cfg.split, most), popular)
    else:
        result["skipped"]["item_cosine"] = f"item_pairs={cfg.item_pairs} for {len(positives_I)} items"
    drawn = {}
    for name, score in scorers.items():
        states = _states(prepared, score, cfg, len(positives_I))
        result[name] = {}
        for variant, state in states.items():
            drawn[name, variant] = retrieval_replicates(state, cfg.ks, cfg.bootstrap, cfg.seed)
            metrics = state.compute(cfg.ks)
            result |= {"users": metrics.pop("users"), "pairs": metrics.pop("pairs")}
            result[name][variant] = {**metrics, "intervals": intervals(drawn[name, variant])}
    model, other = drawn["model", "unseen"], drawn["popularity", "unseen"]
    result["model_minus_popularity"] = intervals({name: model[name] - other[name] for name in model})
    return result


def _states(
    prepared: Prepared, score: Score, cfg: EvaluateConfig, item_rows: int
) -> dict[str, RetrievalState]:
    """What one scorer finds, with all items and with unseen ones alone; memory is bounded by the block."""
    found: dict[str, list[RetrievalState]] = {"unseen": [], "all": []}
    longest = max(cfg.ks)
    for users in _blocks(prepared, cfg.split, max(1, _BLOCK_SCORES // item_rows)):
        offsets, items = csr(users["truth"])
        state = partial(RetrievalState.of, offsets=offsets, items=items, item_rows=item_rows)
        scores = score(users)
        found["all"].append(state(top_items(scores, longest)))
        found["unseen"].append(state(top_items(scores, longest, csr(users["seen"]))))
    if not found["all"]:
        raise DataError(
            f"no user wanted an item in split {cfg.split!r}; recall has nothing to be measured on"
        )
    return {variant: states[0].merge(*states[1:]) for variant, states in found.items()}


def _blocks(prepared: Prepared, split: str, rows: int) -> Iterator[pa.Table]:
    for file in prepared.files(f"users/{split}"):
        table = pq.read_table(file)
        for start in range(0, len(table), rows):
            yield table.slice(start, rows)


def _by_model(trained: Trained, item_ID: torch.Tensor, users: pa.Table) -> torch.Tensor:
    with torch.no_grad():
        return scored(trained.model(collate(users, trained.schema)), item_ID)


def _by_cosine(similar: sp.csr_matrix | np.ndarray, popular: torch.Tensor, users: pa.Table) -> torch.Tensor:
    scores = torch.from_numpy(history_scores(*csr(users["seen"]), similar)).double()
    return scores + 1e-9 * popular.double()  # items like nothing seen come by popularity
