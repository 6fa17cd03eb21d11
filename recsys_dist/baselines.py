"""What a model has to beat: target encoding for ranking; popularity and item-to-item cosine for recall.

All are counts over training rows, so they add up over files and workers. Ids are table rows.

N rows, I rows of the item table, U users
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import scipy.sparse as sp

from recsys_dist.errors import DataError
from recsys_dist.schema import Categorical, Schema


@dataclass(frozen=True)
class LabelCounts:
    """How often each id of each column was seen, and with a positive label.

    seen, positive  column -> [rows of its table] int64
    """

    seen: dict[str, np.ndarray]
    positive: dict[str, np.ndarray]

    @classmethod
    def of(cls, ids: Mapping[str, np.ndarray], labels: np.ndarray, schema: Schema) -> Self:
        """Count the rows of one file: `ids` column -> [N] table rows, `labels` [N] 0/1."""
        seen, positive = {}, {}
        wanted = labels > 0
        for name, id_N in ids.items():
            rows = table_rows(schema, name)
            seen[name] = np.bincount(id_N, minlength=rows)
            positive[name] = np.bincount(id_N[wanted], minlength=rows)
        return cls(seen, positive)

    def merge(self, *others: Self) -> Self:
        """The counts of all files."""
        counts = (self, *others)
        return type(self)(
            {name: np.sum([c.seen[name] for c in counts], axis=0) for name in self.seen},
            {name: np.sum([c.positive[name] for c in counts], axis=0) for name in self.seen},
        )


@dataclass(frozen=True)
class TargetEncoding:
    """Additive target encoding: the logit is a sum of what each column says on its own.

        logit(prior) + Σ_columns [ logit(rate of the id) - logit(prior) ]
        rate = (positives + smoothing·prior) / (seen + smoothing)          (Micci-Barreca 2001)

    An id never seen says nothing. Columns count as independent, so correlated ones exaggerate.
    """

    prior_logit: float
    deviation: dict[str, np.ndarray]

    @classmethod
    def fit(cls, counts: LabelCounts, smoothing: float = 20.0) -> Self:
        """Raises DataError where training rows have only one class: there is no rate to encode."""
        column = next(iter(counts.seen))
        rows, positives = int(counts.seen[column].sum()), int(counts.positive[column].sum())
        if not 0 < positives < rows:
            raise DataError(f"target encoding: {positives} of {rows} training rows are positive; needs both")
        prior = positives / rows
        rates = {
            name: (counts.positive[name] + smoothing * prior) / (counts.seen[name] + smoothing)
            for name in counts.seen
        }
        prior_logit = float(_logit(np.array(prior)))
        return cls(prior_logit, {name: _logit(rate) - prior_logit for name, rate in rates.items()})

    def scores(self, ids: Mapping[str, np.ndarray]) -> np.ndarray:
        """[N] logits for `ids`, column -> [N] table rows."""
        return self.prior_logit + np.sum([self.deviation[name][ids[name]] for name in self.deviation], axis=0)


def encoded_columns(schema: Schema, chosen: tuple[str, ...] | None) -> list[str]:
    """The columns to target-encode: `chosen`, or the user's id, the item's id and categorical context.

    Attributes of users and items say again what the ids say, and the sum then exaggerates: on
    kuairand-pure `is_click`, ids and context reach AUC .7147 / log loss .612, all 35 columns .7070 / .769.
    """
    if chosen is None:
        names = [f.name for f in schema.features if isinstance(f, Categorical) and "." not in f.column]
        if not names:
            raise DataError("target encoding: the schema has no id or categorical context; name `encoded`")
        return names
    for name in chosen:
        table_rows(schema, name)
    return list(chosen)


def table_rows(schema: Schema, name: str) -> int:
    """Table size of a feature with one id per row; DataError for another kind of feature."""
    for feature in schema.singles:
        if feature.name == name and feature.rows is not None:
            return feature.rows
    raise DataError(f"target encoding: {schema[name].kind} feature {name!r} has no single fitted id per row")


def popularity_scores(positives_I: np.ndarray) -> np.ndarray:
    """[I] float64 distinct scores, most positives first, ties by table row: a ranking without ties."""
    ranked = np.argsort(-positives_I, kind="stable")
    scores = np.empty(len(ranked))
    scores[ranked] = -np.arange(len(ranked), dtype=np.float64)
    return scores


@dataclass
class ItemCosine:
    """Item-to-item cosine over who was shown what: cos(i, j) = |users of both| / √(users of i · users of j).

    (Sarwar et al. 2001, WWW, on binary data.) Dense: 4·I² bytes.
    """

    together: np.ndarray  # [I, I] float32 users shown both

    @classmethod
    def empty(cls, item_rows: int) -> Self:
        return cls(np.zeros((item_rows, item_rows), np.float32))

    def add(self, users: np.ndarray, items: np.ndarray) -> None:
        """Count (user code, item row) pairs [P] in any number; all pairs of a user must come in one call."""
        shown = _incidence(users, items, self.together.shape[0])
        both = (shown.T @ shown).tocoo()
        self.together[both.row, both.col] += both.data

    def similarity(self) -> np.ndarray:
        """[I, I] float32 cosine, 0 of an item with itself and with the unknown one. Uses up the counts."""
        norm = np.sqrt(np.maximum(np.diag(self.together), 1.0))
        cosine = self.together
        cosine /= norm[:, None]
        cosine /= norm[None, :]
        np.fill_diagonal(cosine, 0.0)
        cosine[0, :] = cosine[:, 0] = 0.0
        return cosine


def history_scores(offsets: np.ndarray, items: np.ndarray, similarity: np.ndarray) -> np.ndarray:
    """[U, I] Σ over each user's items of their similarity; CSR: user u has items[offsets[u]:offsets[u+1]]."""
    users = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return _incidence(users, items, similarity.shape[0], len(offsets) - 1) @ similarity


def _incidence(users: np.ndarray, items: np.ndarray, item_rows: int, user_rows: int = 0) -> sp.csr_matrix:
    """[U, I] float32, 1 where a user has an item, however often the pair is listed."""
    user_rows = user_rows or (int(users.max()) + 1 if len(users) else 0)
    pairs = np.unique(users.astype(np.int64) * item_rows + items)
    ones = np.ones(len(pairs), np.float32)
    return sp.csr_matrix((ones, (pairs // item_rows, pairs % item_rows)), shape=(user_rows, item_rows))


def _logit(probability: np.ndarray) -> np.ndarray:
    return np.log(probability) - np.log1p(-probability)
