"""Recall → filter → rank, for several requests at once, within their time budget: always an answer.

What fails or is late is left out and named in `degraded`: without ranking the order is recall's, without
recall the candidates are the popular items, without the state users are as the bundle knows them.

R requests, K items that recall hands on, C candidates of all requests
"""

import asyncio
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.bundle import Bundle
from recsys_dist.data import logs, transforms
from recsys_dist.data.logs import LogSpec
from recsys_dist.errors import StateError
from recsys_dist.feature_kinds import Searches, column_of
from recsys_dist.serve.api import (
    Answer,
    Asked,
    InvalidError,
    RankRequest,
    RecallRequest,
    RecommendRequest,
    Scored,
    text_of,
)
from recsys_dist.serve.features import Features
from recsys_dist.serve.rank import Rank
from recsys_dist.serve.recall import Recall
from recsys_dist.serve.state import BundleEvents, UserState
from recsys_dist.serve.stored import numbers_of

T = TypeVar("T")
RetrievalRequest = RecommendRequest | RecallRequest
BUDGET_MS = 200.0


class StageError(Exception):
    """A stage gave no result; the answer goes on without it."""


class Stages(Protocol):
    """The two models, here or behind a network; StageError or TimeoutError where there is no result."""

    async def recall(
        self, users: pa.Table, k: int, excluded: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]: ...

    async def rank(self, users: pa.Table, of: np.ndarray, positions: np.ndarray) -> np.ndarray: ...


class InProcess:
    """Both stages in this process: what a replica holds, and what replays golden requests."""

    def __init__(self, bundle: Bundle) -> None:
        self._recall, self._rank = Recall.of(bundle), Rank.of(bundle)

    async def recall(
        self, users: pa.Table, k: int, excluded: list[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        return self._recall.retrieve(users, k, excluded)

    async def rank(self, users: pa.Table, of: np.ndarray, positions: np.ndarray) -> np.ndarray:
        return self._rank.predictions(users, of, positions)


@dataclass
class Work:
    """Requests of one batch on their way.

    deadline  when, on `time.perf_counter`, the first of them must be answered
    rows      [R, K] item rows, 0 = none; `scores` [R, K] of recall, None where it gave none
    """

    asked: Sequence[Asked]
    deadline: float
    began: float
    users: pa.Table
    seen: list[np.ndarray]
    degraded: list[list[str]]
    ms: dict[str, float] = field(default_factory=dict)
    rows: np.ndarray = field(default_factory=lambda: np.empty((0, 0), np.int32))
    scores: np.ndarray | None = None
    predictions: np.ndarray | None = None

    def note(self, reason: str) -> None:
        for reasons in self.degraded:
            reasons.append(reason)


class Recommender:
    """Answers requests from a bundle, the users' state, and two stages; thread-safe as its parts are."""

    def __init__(self, bundle: Bundle, state: UserState | None = None, stages: Stages | None = None) -> None:
        self.bundle = bundle
        self.features = Features.of(bundle, bundle.recall, bundle.ranking)
        self.stages = stages or InProcess(bundle)
        self._state = state
        self._events = BundleEvents(bundle)
        self._item = bundle.encoders.vocabularies[bundle.encoders.schema.item_id.name]
        self._ids = np.r_[np.array([""], object), bundle.item_ids.to_numpy(zero_copy_only=False)]
        self._position_of_row = np.r_[0, bundle.items.positions(bundle.item_ids)]
        self.spec = LogSpec.from_schema(bundle.encoders.schema)
        read = {column_of(f) for f in bundle.encoders.schema.features if not isinstance(f, Searches)}
        self._wanted = [name for name in self.spec.context if name in read]  # not searches
        offset_us = int(bundle.encoders.schema.utc_offset_hours * transforms.HOUR_US)
        self._earliest_us = bundle.encoders.freeze_day * transforms.DAY_US - offset_us

    def check(self, asked: Asked) -> None:
        """InvalidError for a request as of a time that the bundle's frozen statistics do not describe."""
        if asked.timestamp is not None and asked.timestamp.timestamp() * 1e6 < self._earliest_us:
            earliest = datetime.fromtimestamp(self._earliest_us / 1e6, UTC).isoformat()
            problem = f"is before {earliest}, where this bundle's knowledge ends"
            raise InvalidError([{"field": "timestamp", "problem": problem}])

    async def recommend(
        self, asked: Sequence[RecommendRequest], budget_ms: float = BUDGET_MS, since: float | None = None
    ) -> list[Answer]:
        """The k best of each request's candidates, by what the ranker predicts.

        The budget counts from `since`, when the first of them came (`time.perf_counter`); None is now.
        """
        work = self._begin(asked, budget_ms, since)
        excluded = self._excluded(asked, work.seen)
        await self._retrieve(work, max(a.candidates for a in asked), excluded)
        for rows, request in zip(work.rows, asked, strict=True):
            rows[request.candidates :] = 0
        of, at = np.nonzero(work.rows)
        predictions = await self._rank(work, of, self._position_of_row[work.rows[of, at]])
        if predictions is not None:
            work.predictions = np.full(work.rows.shape, -np.inf, np.float32)
            work.predictions[of, at] = predictions
            self._reorder(work)
        return self._answers(work, asked)

    async def recall(self, asked: Sequence[RecallRequest], budget_ms: float = BUDGET_MS) -> list[Answer]:
        """Recall alone: the k nearest items of each request."""
        work = self._begin(asked, budget_ms)
        await self._retrieve(work, max(a.k for a in asked), self._excluded(asked, work.seen))
        return self._answers(work, asked)

    async def rank(self, asked: Sequence[RankRequest], budget_ms: float = BUDGET_MS) -> list[Answer]:
        """Ranking alone: the items of each request, best first; in the order given where ranking fails."""
        work = self._begin(asked, budget_ms)
        counts = np.array([len(a.items) for a in asked])
        ids = pa.array([item for a in asked for item in a.items], pa.string())
        of, positions = np.repeat(np.arange(len(asked)), counts), self.bundle.items.positions(ids)
        for request in np.unique(of[positions == 0]):
            work.degraded[request].append("unknown_items")
        found = await self._rank(work, of, positions)
        answers, ends = [], np.cumsum(counts)
        for r, (start, end) in enumerate(zip(ends - counts, ends, strict=True)):
            mine = None if found is None else found[start:end]
            order = range(len(asked[r].items)) if mine is None else np.argsort(-mine, kind="stable")
            scored = [
                self._scored(asked[r].items[i], None if mine is None else float(mine[i]), None) for i in order
            ]
            answers.append(self._answer(work, r, scored))
        return answers

    def _begin(self, asked: Sequence[Asked], budget_ms: float, since: float | None = None) -> Work:
        now = time.perf_counter()
        began = since or now
        budgets = [a.budget_ms or budget_ms for a in asked]
        users = [a.user_id for a in asked]
        distinct = list(dict.fromkeys(users))
        past, seen = self._events.read(distinct), self._events.seen(users)
        failed = []
        try:
            if self._state is not None:
                past, seen = self._with_state(past, distinct, users, seen)
        except StateError:
            failed = ["state_failed"]
        active = set(pc.unique(past["user_id"]).to_pylist())
        degraded = [failed + more for more in self._missing(asked, active)]
        table = self.features.users(past, self._table(asked))
        work = Work(asked, began + min(budgets) / 1000, began, table, seen, degraded)
        work.ms |= {"waiting": 1000 * (now - began), "features": 1000 * (time.perf_counter() - now)}
        return work

    def _with_state(
        self, past: pa.Table, distinct: list[str], users: list[str], seen: list[np.ndarray]
    ) -> tuple[pa.Table, list[np.ndarray]]:
        assert self._state is not None
        lately = self._state.read(distinct)
        if not len(lately):
            return past, seen
        rows = self._item.lookup(lately["item_id"])
        of = np.array(lately["user_id"].to_pylist(), object)
        more = {user: rows[of == user] for user in set(of)}
        seen = [np.r_[s, more.get(user, s[:0])] for s, user in zip(seen, users, strict=True)]
        both = pa.concat_tables([past, lately], promote_options="default")
        again = logs.duplicates(both)  # what the log that the bundle was made from has already
        again[: len(past)] = False
        return both.filter(pa.array(~again)), seen

    def _missing(self, asked: Sequence[Asked], active: set[str]) -> list[list[str]]:
        """What each answer has to do without from the start; `active` are the users with any past event."""
        known = self.bundle.users.positions(pa.array([a.user_id for a in asked], pa.string())) > 0
        found = []
        for request, is_known in zip(asked, known, strict=True):
            given = request.context
            reasons = [] if is_known else ["unknown_user"]
            reasons += [] if request.user_id in active else ["no_history"]
            reasons += [f"unknown_context:{name}" for name in given if name not in self._wanted]
            found.append(reasons + [f"missing_context:{n}" for n in self._wanted if given.get(n) is None])
        return found

    def _table(self, asked: Sequence[Asked]) -> pa.Table:
        """[R] user_id, timestamp and context of the requests, in the canonical log's types."""
        now = datetime.now(UTC)
        columns: dict[str, pa.Array] = {
            "user_id": pa.array([a.user_id for a in asked], pa.string()),
            "timestamp": pa.array([a.timestamp or now for a in asked], pa.timestamp("us", "UTC")),
        }
        for name, numeric in self.spec.context.items():
            values = pa.array([text_of(a.context.get(name)) for a in asked], pa.string())
            columns[name] = numbers_of(values) if numeric else values
        return pa.table(columns)

    def _excluded(self, asked: Sequence[RetrievalRequest], seen: list[np.ndarray]) -> list[np.ndarray]:
        """Item rows that each request may not get: those it names and those the user saw."""
        return [
            self._named(request) if request.include_seen else np.r_[self._named(request), rows]
            for request, rows in zip(asked, seen, strict=True)
        ]

    def _named(self, request: RetrievalRequest) -> np.ndarray:
        """Item rows that the request excludes by name."""
        return self._item.lookup(pa.array(request.exclude, pa.string()))

    async def _retrieve(self, work: Work, k: int, excluded: list[np.ndarray]) -> None:
        k = min(k, len(self._ids) - 1)
        found = await _timed(work, "recall", self.stages.recall(work.users, k, excluded))
        if found is not None:
            work.rows, work.scores = found[0].copy(), found[1]
        else:
            work.rows = np.zeros((len(work.asked), k), np.int32)
            for row, out in zip(work.rows, excluded, strict=True):
                left = self._popular(out, k)
                row[: len(left)] = left

    async def _rank(self, work: Work, of: np.ndarray, positions: np.ndarray) -> np.ndarray | None:
        if not len(of):
            return None  # nothing is left to rank
        return await _timed(work, "ranking", self.stages.rank(work.users, of, positions))

    def _popular(self, excluded: np.ndarray, k: int) -> np.ndarray:
        first = self.bundle.popular[: k + len(excluded)]
        return first[~np.isin(first, excluded)][:k]

    def _reorder(self, work: Work) -> None:
        assert work.predictions is not None
        order = np.argsort(-work.predictions, axis=1, kind="stable")  # ties as recall has them
        work.rows = np.take_along_axis(work.rows, order, axis=1)
        work.predictions = np.take_along_axis(work.predictions, order, axis=1)
        if work.scores is not None:
            work.scores = np.take_along_axis(work.scores, order, axis=1)

    def _answers(self, work: Work, asked: Sequence[RetrievalRequest]) -> list[Answer]:
        """Each request's first k; where fewer are left, popular items make the list full, seen ones last."""
        answers = []
        for r, request in enumerate(asked):
            at = np.flatnonzero(work.rows[r])[: request.k]
            scored = [self._listed(work, r, i) for i in at]
            lacking = request.k - len(at)
            if lacking:
                [excluded] = self._excluded([request], [work.seen[r]])
                more = self._popular(np.r_[excluded, work.rows[r][at]], lacking)
                if len(more) < lacking:
                    taken = np.r_[self._named(request), work.rows[r][at], more]
                    more = np.r_[more, self._popular(taken, lacking - len(more))]
                    work.degraded[r].append("few_unseen_items")
                scored += [self._scored(self._ids[row], None, None) for row in more]
            answers.append(self._answer(work, r, scored))
        return answers

    def _listed(self, work: Work, r: int, i: int) -> Scored:
        def of(values: np.ndarray | None) -> float | None:
            return None if values is None else float(values[r, i])

        return self._scored(self._ids[work.rows[r, i]], of(work.predictions), of(work.scores))

    def _scored(self, item_id: str, predicted: float | None, recall_score: float | None) -> Scored:
        amount = self.bundle.ranking.model.predicts is not None
        return Scored(
            item_id=item_id,
            probability=None if amount else predicted,
            expected_value=predicted if amount else None,
            recall_score=recall_score,
        )

    def _answer(self, work: Work, r: int, scored: list[Scored]) -> Answer:
        total = 1000 * (time.perf_counter() - work.began)
        return Answer(
            user_id=work.asked[r].user_id,
            items=scored,
            bundle=self.bundle.manifest.version,
            ms={name: round(ms, 2) for name, ms in {**work.ms, "total": total}.items()},
            degraded=work.degraded[r],
        )


async def _timed(work: Work, stage: str, result: Awaitable[T]) -> T | None:
    """The stage's result, or None, noted, where it fails or the budget is used up."""
    began = time.perf_counter()
    try:
        return await asyncio.wait_for(result, max(work.deadline - began, 0.001))
    except TimeoutError:
        work.note(f"{stage}_late")
    except StageError:
        work.note(f"{stage}_failed")
    finally:
        work.ms[stage] = 1000 * (time.perf_counter() - began)
    return None
