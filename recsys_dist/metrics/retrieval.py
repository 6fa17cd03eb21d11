"""Metrics of top-k lists against the items that users went on to want: recall, NDCG, coverage.

U users, K length of the lists, P wanted (user, item) pairs
"""

from dataclasses import dataclass
from typing import Self

import numpy as np

from recsys_dist.errors import DataError


@dataclass(frozen=True)
class RetrievalState:
    """What lists found, user by user. Merged states give the same metrics as one worker's.

    hits    [U, K] bool: is the list's k-th item wanted
    wanted  [U] how many items each user wants
    first_rank  [rows of the item table] best position at which any list holds the item, K if none does
    """

    hits: np.ndarray
    wanted: np.ndarray
    first_rank: np.ndarray

    @classmethod
    def of(cls, top: np.ndarray, offsets: np.ndarray, items: np.ndarray, item_rows: int) -> Self:
        """Compare lists with truth.

        top      [U, K] item rows, best first, each at most once per user; rows < 1 fill a short list
        offsets  [U + 1], items [P]: user u wants items[offsets[u]:offsets[u + 1]], each once; only
                 row 0, an item that training never saw, may repeat: wanted, and never found
        """
        if len(offsets) != len(top) + 1 or offsets[-1] != len(items):
            raise DataError(f"truth of {len(offsets) - 1} users, {len(items)} items, for {len(top)} lists")
        wanted = np.diff(offsets)
        key = np.repeat(np.arange(len(top)), wanted) * item_rows + items
        key = key[items > 0]
        if len(np.unique(key)) != len(key):
            raise DataError("a user's wanted items must be listed once each")
        of_list = np.where(top > 0, np.arange(len(top))[:, None] * item_rows + top, -1)
        hits = np.isin(of_list, key)
        return cls(hits, wanted, _first_rank(top, item_rows))

    def merge(self, *others: Self) -> Self:
        """Users of this and the others, whose lists must be of one length and catalogue."""
        states = (self, *others)
        return type(self)(
            np.concatenate([s.hits for s in states]),
            np.concatenate([s.wanted for s in states]),
            np.minimum.reduce([s.first_rank for s in states]),
        )

    def compute(self, ks: tuple[int, ...]) -> dict[str, float]:
        """`recall@k`, `user_recall@k`, `ndcg@k`, `coverage@k` for each k, and users, pairs.

        recall@k       found pairs / all pairs
        user_recall@k  mean over users who want something of found / wanted (BARS, LightGCN)
        ndcg@k         mean over the same users; ideal DCG has min(k, wanted) items on top
        coverage@k     part of the catalogue (rows ≥ 1) that is in anybody's first k
        """
        values: dict[str, float] = {}
        for k in ks:
            found, recall, ndcg = self.per_user(k)
            values[f"recall@{k}"] = _ratio(found.sum(), self.wanted.sum())
            values[f"user_recall@{k}"] = _ratio(np.sort(recall).sum(), len(recall))
            values[f"ndcg@{k}"] = _ratio(np.sort(ndcg).sum(), len(ndcg))
            values[f"coverage@{k}"] = _ratio((self.first_rank[1:] < k).sum(), len(self.first_rank) - 1)
        return {**values, "users": int((self.wanted > 0).sum()), "pairs": int(self.wanted.sum())}

    def per_user(self, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Found items [U'], recall [U'] and NDCG [U'] at k of the users who want something, in order."""
        if k > self.hits.shape[1]:
            raise DataError(f"metrics at {k} need lists of {k} items; these have {self.hits.shape[1]}")
        asked = self.wanted > 0
        hits, wanted = self.hits[asked, :k], self.wanted[asked]
        discount = 1.0 / np.log2(np.arange(2, k + 2))
        ideal = np.r_[0.0, np.cumsum(discount)][np.minimum(wanted, k)]
        found = hits.sum(axis=1)
        dcg = np.zeros(len(hits))
        for rank in range(k):  # a fixed order of addition per user, which a matrix product does not keep
            dcg += hits[:, rank] * discount[rank]
        return found, found / wanted, dcg / ideal


def _first_rank(top: np.ndarray, item_rows: int) -> np.ndarray:
    """[item_rows] the best position any list gives the item; K where none holds it."""
    first = np.full(item_rows, top.shape[1], np.int64)
    rank = np.broadcast_to(np.arange(top.shape[1]), top.shape)
    listed = top > 0
    np.minimum.at(first, top[listed], rank[listed])
    return first


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else np.nan
