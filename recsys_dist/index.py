"""The only faiss: the k items whose vectors have the largest inner product with a query's.

Exact below a size where that is as fast, an inverted file (IVF) above. Both apply the filters before the
cut, so k items come back wherever k are left.

I rows of the item table, D dimension, Q queries
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import faiss
import numpy as np
import torch
from pydantic import Field

from recsys_dist.config import Config, rng_for
from recsys_dist.errors import BundleError

Excluded = Sequence[np.ndarray] | None  # rows of the item table that each query must not get
_POINTS_PER_LIST = 64  # k-means on more of them takes longer and finds the same (500k x 64: 86 s on all)


class IndexConfig(Config):
    """How to build an index."""

    exact_rows: int = Field(
        100_000,
        ge=0,
        description="largest catalogue that is searched exactly; there, at D = 64, one thread needs 1-2 ms "
        "a query, IVF .1 ms; at 10,000 items both need .1 ms",
    )
    recall: float = Field(0.998, gt=0, le=1, description="of exact search at `recall_at` that IVF must reach")
    recall_at: int = Field(200, ge=1)
    queries: int = Field(256, ge=1, description="on which that is measured")
    seed: int = Field(0, ge=0, lt=2**31 - 1)


class Index(Protocol):
    """What finds items. `kind` is "exact", "ivf" or "scores"; thread-safe."""

    kind: ClassVar[str]

    def search(
        self, queries: np.ndarray, k: int, excluded: Excluded = None, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows [Q, k] int32 by falling score, ties by row, and scores [Q, k] float32, for `queries` [Q, D].

        `excluded` has the rows to leave out per query, `allowed` [I] bool those that any may get. Row 0,
        the unknown item, is never found; where fewer than k are left the rest is row 0 and -inf.
        """
        ...


@dataclass(frozen=True)
class Exact:
    """Every vector is looked at. Uses torch's threads (`torch.set_num_threads`)."""

    vectors: np.ndarray  # [I, D] float32
    kind: ClassVar[str] = "exact"

    def search(
        self, queries: np.ndarray, k: int, excluded: Excluded = None, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        scores = (torch.from_numpy(queries) @ torch.from_numpy(self.vectors).T).numpy()
        return _best_left(scores, k, excluded, allowed)


@dataclass(frozen=True)
class Given:
    """The queries are scores of all items already, [Q, I]: of models that have no vectors of items."""

    kind: ClassVar[str] = "scores"

    def search(
        self, queries: np.ndarray, k: int, excluded: Excluded = None, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        return _best_left(queries.copy(), k, excluded, allowed)


@dataclass(frozen=True)
class Ivf:
    """The vectors in lists around centroids; a query looks at the `nprobe` nearest lists. One thread."""

    inverted: faiss.IndexIVFFlat  # row r has id r
    rows: int  # I
    kind: ClassVar[str] = "ivf"

    def search(
        self, queries: np.ndarray, k: int, excluded: Excluded = None, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        faiss.omp_set_num_threads(1)  # of the calling thread: replicas share the cores
        if excluded is None:
            scores, rows = self._search(queries, k, allowed)
        else:
            found = [
                self._search(query[None], k, _without(rows, allowed, self.rows))
                for query, rows in zip(queries, excluded, strict=True)
            ]
            scores, rows = (np.concatenate(parts) for parts in zip(*found, strict=True))
        scores[rows < 0] = -np.inf
        order = np.lexsort((rows, -scores))
        rows = np.take_along_axis(np.maximum(rows, 0), order, axis=1).astype(np.int32)
        return rows, np.take_along_axis(scores, order, axis=1)

    def _search(
        self, queries: np.ndarray, k: int, allowed: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        if allowed is None:
            return self.inverted.search(queries, k)
        bits = np.packbits(allowed, bitorder="little")
        chosen = faiss.IDSelectorBitmap(self.rows, faiss.swig_ptr(bits))
        parameters = faiss.SearchParametersIVF(  # type: ignore[call-arg]  # its stub lacks what it takes
            sel=chosen, nprobe=self.inverted.nprobe
        )
        return self.inverted.search(queries, k, params=parameters)

    def save(self, path: Path) -> None:
        faiss.write_index(self.inverted, str(path))


def exact(vectors: np.ndarray) -> Index:
    """What misses nothing."""
    return Exact(vectors) if vectors.shape[1] else Given()


def build(vectors: np.ndarray, cfg: IndexConfig | None = None, queries: np.ndarray | None = None) -> Index:
    """The index of item vectors [I, D] float32; `queries` [n, D] are such as will come (default: items).

    IVF looks at as few lists as give `cfg.recall` of the exact result on those queries.
    """
    cfg = cfg or IndexConfig()
    if len(vectors) <= cfg.exact_rows or not vectors.shape[1]:
        return exact(vectors)
    index = Ivf(_inverted(vectors, cfg), len(vectors))
    rng = rng_for(cfg.seed, "index queries")
    asked = vectors[1:] if queries is None else queries
    asked = asked[rng.permutation(len(asked))[: cfg.queries]]
    truth, _ = Exact(vectors).search(asked, cfg.recall_at)
    while index.inverted.nprobe < index.inverted.nlist:
        if overlap(index.search(asked, cfg.recall_at)[0], truth) >= cfg.recall:
            break
        index.inverted.nprobe = min(index.inverted.nlist, math.ceil(index.inverted.nprobe * 1.5))
    return index


def load(path: Path, vectors: np.ndarray) -> Ivf:
    """The IVF in a file whose sha256 was checked: faiss reads a damaged payload without a word."""
    try:
        inverted = faiss.read_index(str(path))
    except RuntimeError as error:
        raise BundleError(f"{str(path)!r} is no faiss index: {str(error).splitlines()[0]}") from None
    shape = (inverted.ntotal + 1, inverted.d)
    if not isinstance(inverted, faiss.IndexIVFFlat) or shape != vectors.shape:
        found = f"{type(inverted).__name__} of {shape}"
        raise BundleError(f"{str(path)!r} holds an {found}, the item vectors are {vectors.shape}")
    return Ivf(inverted, len(vectors))


def recall(index: Index, vectors: np.ndarray, queries: np.ndarray, k: int) -> float:
    """Share of the k best items that `index` finds, over `queries` [Q, D]."""
    return overlap(index.search(queries, k)[0], exact(vectors).search(queries, k)[0])


def overlap(found: np.ndarray, truth: np.ndarray) -> float:
    """Share of the rows >= 1 of `truth` [Q, k] that `found` [Q, k] has for the same query."""
    wanted = int((truth > 0).sum())
    hits = sum(np.isin(t[t > 0], f).sum() for f, t in zip(found, truth, strict=True))
    return float(hits / wanted) if wanted else 1.0


def _inverted(vectors: np.ndarray, cfg: IndexConfig) -> faiss.IndexIVFFlat:
    items, dim = vectors[1:], vectors.shape[1]
    lists = max(1, min(int(4 * math.sqrt(len(items))), len(items) // 39))  # faiss wants 39 points a list
    inverted = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, lists, faiss.METRIC_INNER_PRODUCT)
    inverted.cp.seed, inverted.cp.niter = cfg.seed + 1, 10
    inverted.cp.max_points_per_centroid = _POINTS_PER_LIST
    inverted.train(items)
    inverted.add_with_ids(items, np.arange(1, len(vectors), dtype=np.int64))
    return inverted


def _without(rows: np.ndarray, allowed: np.ndarray | None, of_rows: int) -> np.ndarray | None:
    if not len(rows):
        return allowed
    left = np.ones(of_rows, bool) if allowed is None else allowed.copy()
    left[rows] = False
    return left


def _best_left(
    scores: np.ndarray, k: int, excluded: Excluded, allowed: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """What `Index.search` gives for these scores [Q, I], which it writes over."""
    scores[:, 0] = -np.inf
    if allowed is not None:
        scores[:, ~allowed] = -np.inf
    if excluded is not None:
        of_query = np.repeat(np.arange(len(excluded)), [len(rows) for rows in excluded])
        scores[of_query, np.concatenate([*excluded, np.empty(0, np.int32)]).astype(np.int64)] = -np.inf
    return _best(scores, k)


def _best(scores: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns and values of the k largest of each row [Q, I], by falling value, then column."""
    taken = min(k, scores.shape[1])
    least = np.partition(scores, -taken, axis=1)[:, -taken]
    rows, best = np.zeros((len(scores), k), np.int32), np.full((len(scores), k), -np.inf, np.float32)
    for q, (of_query, cut) in enumerate(zip(scores, least, strict=True)):
        at = np.flatnonzero(of_query >= cut)
        at = at[of_query[at] > -np.inf]
        at = at[np.argsort(-of_query[at], kind="stable")][:k]
        rows[q, : len(at)], best[q, : len(at)] = at, of_query[at]
    return rows, best
