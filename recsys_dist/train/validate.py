"""Scoring of held-out rows by models whole or sharded: what validation and evaluation share.

B rows, U users, I rows of the item table, K length of the lists
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from recsys_dist.batch import Batch
from recsys_dist.data.collate import collate
from recsys_dist.metrics import RankingState, RetrievalState
from recsys_dist.models.protocol import RankModel, RecallModel
from recsys_dist.schema import Schema


def padded(table: pa.Table | None, schema: Schema, idle: Batch) -> Batch:
    """The rows of a table, padded to as many as `idle` has; `idle` itself for no table."""
    if table is None:
        return idle
    return collate(_with_item_columns(table, schema), schema).to(idle.device).pad(idle.rows)


@torch.no_grad()
def score_rows(model: RankModel, table: pa.Table | None, schema: Schema, idle: Batch) -> np.ndarray:
    """[N] float32 logits of the table's rows, at most as many as `idle` has.

    On sharded tables all workers call it, those without rows with None.
    """
    logits = model.forward(padded(table, schema, idle))
    return logits[: 0 if table is None else len(table)].cpu().numpy()


def ranked_rows(model: RankModel, table: pa.Table | None, schema: Schema, idle: Batch) -> RankingState | None:
    """What `score_rows` gives, beside labels and users."""
    scores = score_rows(model, table, schema, idle)
    if table is None:
        return None
    return RankingState(
        scores=scores,
        labels=table[schema.ranking_label].to_numpy(),
        users=user_keys(table["user_id"]),
    )


@torch.no_grad()
def item_vectors(model: RecallModel) -> torch.Tensor:
    """[I, D]; on sharded tables all workers call it, and all get it whole."""
    return model.item_vectors()


@torch.no_grad()
def recall_users(
    model: RecallModel, item_ID: torch.Tensor, table: pa.Table | None, schema: Schema, idle: Batch, k: int
) -> RetrievalState | None:
    """Lists of k items for the table's users against `truth`, `seen` ones masked; all workers call it."""
    user_BD = model.forward(padded(table, schema, idle))
    if table is None:
        return None
    top_UK = top_items(scored(user_BD[: len(table)], item_ID), k, csr(table["seen"]))
    return RetrievalState.of(top_UK, *csr(table["truth"]), len(item_ID))


def scored(user_UD: torch.Tensor, item_ID: torch.Tensor) -> torch.Tensor:
    """[U, I] scores, of its own memory, from what a recall model gives of users and of items."""
    return user_UD @ item_ID.T if item_ID.shape[1] else user_UD.clone()


def top_items(
    score_UI: torch.Tensor, k: int, seen: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """[U, k] rows of the best items, best first; seen and unknown (row 0) ones left out, in `score_UI` too.

    `seen` is (offsets [U + 1], items): user u's are items[offsets[u]:offsets[u + 1]]. Where fewer than
    k items are left, the list ends in zeros.
    """
    score_UI[:, 0] = -torch.inf
    if seen is not None:
        offsets, items = seen
        of_user = np.repeat(np.arange(len(score_UI)), np.diff(offsets))
        at = [torch.from_numpy(where).to(score_UI.device) for where in (of_user, items.astype(np.int64))]
        score_UI[at[0], at[1]] = -torch.inf
    best = torch.topk(score_UI, min(k, score_UI.shape[1] - 1), dim=1)
    top = torch.where(best.values == -torch.inf, 0, best.indices).cpu().numpy()
    return np.pad(top, ((0, 0), (0, k - top.shape[1])))


def user_keys(users: pa.ChunkedArray) -> np.ndarray:
    """[N] fixed-width bytes of string ids: sortable, mergeable between workers, no Python objects."""
    encoded = users.combine_chunks().dictionary_encode()
    values = np.asarray(encoded.dictionary.cast(pa.binary()).to_pylist(), dtype=np.bytes_)
    return values[encoded.indices.to_numpy()]


def csr(lists: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A list column as offsets [U + 1] from 0 and values."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy()
    return np.r_[0, np.cumsum(lengths)], pc.list_flatten(lists).to_numpy()


def _with_item_columns(table: pa.Table, schema: Schema) -> pa.Table:
    """Rows of users lack the item's own features, which a user tower does not read: unknown items."""
    for feature in schema.singles:
        if feature.name not in table.column_names:
            table = table.append_column(feature.name, pa.array(np.zeros(len(table), np.int32)))
    return table
