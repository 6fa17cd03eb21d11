"""Every request gets a full list: whatever is missing, late or broken is left out and named."""

import asyncio
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from recsys_dist.bundle import Bundle
from recsys_dist.data.keys import Keys
from recsys_dist.serve.api import Answer, InvalidError, RankRequest, RecommendRequest
from recsys_dist.serve.recommend import InProcess, Recommender, StageError
from recsys_dist.serve.state import BundleEvents, EmbeddedState, canonical_schema

BUDGET_MS = 60_000


class Broken(InProcess):
    """Stages of which some fail or are late."""

    def __init__(self, bundle: Bundle, failing: tuple[str, ...] = (), late: tuple[str, ...] = ()) -> None:
        super().__init__(bundle)
        self.failing, self.late = failing, late

    async def recall(self, *args: Any) -> Any:
        return await self._perhaps("recall", super().recall(*args))

    async def rank(self, *args: Any) -> Any:
        return await self._perhaps("ranking", super().rank(*args))

    async def _perhaps(self, stage: str, result: Any) -> Any:
        if stage not in (*self.failing, *self.late):
            return await result
        result.close()
        if stage in self.late:
            await asyncio.sleep(60)
        raise StageError("dead")


def ask(recommender: Recommender, *requests: RecommendRequest, budget_ms: float = BUDGET_MS) -> list[Answer]:
    return asyncio.run(recommender.recommend(requests, budget_ms))


def ids(answer: Answer) -> list[str]:
    return [item.item_id for item in answer.items]


@pytest.fixture(scope="module")
def recommender(bundle: Bundle) -> Recommender:
    return Recommender(bundle)


def seen_by(bundle: Bundle, user: str) -> set[str]:
    row = bundle.seen.to_pylist()[bundle.seen["user_id"].to_pylist().index(user)]
    return {bundle.item_ids[r - 1].as_py() for r in row["items"] if r}


def test_the_list_is_full_unseen_and_by_probability(bundle: Bundle, recommender: Recommender) -> None:
    [answer] = ask(recommender, RecommendRequest(user_id="u3", k=3, context={"device": "tv"}))
    unseen = [item for item in answer.items if item.probability is not None]
    assert len(answer.items) == 3 == len(set(ids(answer)))
    assert not {item.item_id for item in unseen} & seen_by(bundle, "u3")
    probabilities = [item.probability or 0 for item in unseen]
    assert probabilities == sorted(probabilities, reverse=True)
    assert answer.bundle == bundle.manifest.version
    assert set(answer.ms) == {"waiting", "features", "recall", "ranking", "total"}


def test_requests_in_a_batch_do_not_see_each_other(recommender: Recommender) -> None:
    requests = [
        RecommendRequest(user_id=user, k=4, candidates=c, include_seen=True, exclude=out)
        for user, c, out in (("u1", 5, []), ("u2", 20, ["i1"]), ("u1", 8, ["i2"]), ("nobody", 6, []))
    ]
    together = ask(recommender, *requests)
    for request, answer in zip(requests, together, strict=True):
        [alone] = ask(recommender, request)
        assert ids(alone) == ids(answer)
        assert alone.degraded == answer.degraded
        np.testing.assert_allclose(
            [item.probability for item in alone.items], [item.probability for item in answer.items], atol=1e-6
        )


def test_excluded_items_never_come_back(recommender: Recommender) -> None:
    [all_of_them] = ask(recommender, RecommendRequest(user_id="u1", k=10, include_seen=True))
    out = ids(all_of_them)[:5]
    [answer] = ask(recommender, RecommendRequest(user_id="u1", k=10, include_seen=True, exclude=out))
    assert not set(out) & set(ids(answer))


def test_a_stranger_gets_a_full_list_flagged(recommender: Recommender) -> None:
    [answer] = ask(
        recommender, RecommendRequest(user_id="nobody", k=5, context={"colour": "red", "query": "shoes"})
    )
    assert len(answer.items) == 5
    assert answer.degraded == [
        "unknown_user",
        "no_history",
        "unknown_context:colour",
        "unknown_context:query",  # what led to an event, which this is not
        "missing_context:device",
    ]


@pytest.mark.parametrize("how", ["failing", "late"])
def test_without_recall_popular_items_are_ranked(bundle: Bundle, how: str) -> None:
    broken = Recommender(bundle, stages=Broken(bundle, **{how: ("recall",)}))
    budget = 30 if how == "late" else BUDGET_MS
    [answer] = ask(broken, RecommendRequest(user_id="nobody", k=4, candidates=4), budget_ms=budget)
    assert f"recall_{'failed' if how == 'failing' else 'late'}" in answer.degraded
    popular = [bundle.item_ids[row - 1].as_py() for row in bundle.popular[:4]]
    assert sorted(ids(answer)) == sorted(popular)
    assert all(item.recall_score is None for item in answer.items)


def test_the_budget_counts_from_when_a_request_came(bundle: Bundle) -> None:
    slow = Recommender(bundle, stages=Broken(bundle, late=("recall", "ranking")))
    came = time.perf_counter() - 10
    [answer] = asyncio.run(slow.recommend([RecommendRequest(user_id="u1", k=4)], 5_000, came))
    assert {"recall_late", "ranking_late"} <= set(answer.degraded) and len(answer.items) == 4
    assert answer.ms["waiting"] > 9_900 and answer.ms["total"] < 12_000


def test_without_ranking_the_order_is_recalls(bundle: Bundle) -> None:
    broken = Recommender(bundle, stages=Broken(bundle, failing=("ranking",)))
    [answer] = ask(broken, RecommendRequest(user_id="u1", k=4, include_seen=True))
    assert "ranking_failed" in answer.degraded
    scores = [item.recall_score or 0 for item in answer.items]
    assert scores == sorted(scores, reverse=True)
    assert all(item.probability is None for item in answer.items)


def test_without_both_the_list_is_popular(bundle: Bundle) -> None:
    broken = Recommender(bundle, stages=Broken(bundle, failing=("recall", "ranking")))
    [answer] = ask(broken, RecommendRequest(user_id="nobody", k=4))
    assert ids(answer) == [bundle.item_ids[row - 1].as_py() for row in bundle.popular[:4]]


def test_who_has_seen_everything_gets_seen_items_flagged(bundle: Bundle) -> None:
    everything = pa.array([np.arange(1, len(bundle.item_ids) + 1, dtype=np.int32)])
    seen = pa.table({"user_id": ["u1"], "items": everything})
    [answer] = ask(Recommender(replace(bundle, seen=seen)), RecommendRequest(user_id="u1", k=5))
    assert len(answer.items) == 5
    assert "few_unseen_items" in answer.degraded


def test_a_list_is_filled_with_unseen_items_as_long_as_there_are_some(bundle: Bundle) -> None:
    popular = [bundle.item_ids[row - 1].as_py() for row in bundle.popular]
    seen = pa.table({"user_id": ["u1"], "items": pa.array([bundle.popular[:5]])})
    [answer] = ask(Recommender(replace(bundle, seen=seen)), RecommendRequest(user_id="u1", k=6, candidates=1))
    first, *filled = ids(answer)
    assert filled == [item for item in popular[5:] if item != first][:5]
    assert "few_unseen_items" not in answer.degraded


def test_what_a_bundle_was_trained_on_does_not_count_twice(bundle: Bundle, tmp_path: Path) -> None:
    users = ["u1", "u2", "u3"]
    own = BundleEvents(bundle).read(users)
    state = EmbeddedState(tmp_path, canonical_schema(bundle))
    state.append(own)
    assert len(state.read(users)) == len(own) > 0
    asked = [RecommendRequest(user_id=user, timestamp=datetime(2026, 1, 2, tzinfo=UTC)) for user in users]
    with_state, without = (Recommender(bundle, s)._begin(asked, BUDGET_MS).users for s in (state, None))
    assert with_state == without


def test_an_unknown_item_is_ranked_and_flagged(recommender: Recommender) -> None:
    request = RankRequest(user_id="u1", items=["i1", "never heard of", "i2"])
    [answer] = asyncio.run(recommender.rank([request], BUDGET_MS))
    assert sorted(ids(answer)) == ["i1", "i2", "never heard of"]
    assert "unknown_items" in answer.degraded


def test_as_of_a_time_before_the_statistics_is_refused(bundle: Bundle, recommender: Recommender) -> None:
    assert Keys(bundle.users.ids).positions(pa.array(["u1"]))[0] > 0
    with pytest.raises(InvalidError) as found:
        recommender.check(
            RecommendRequest.model_validate({"user_id": "u1", "timestamp": "2024-03-07T00:00:00Z"})
        )
    assert found.value.problems[0]["field"] == "timestamp"
    recommender.check(RecommendRequest.model_validate({"user_id": "u1", "timestamp": "2024-03-08T12:00:00Z"}))


def test_context_is_read_as_the_log_reads_it_and_none_fails_the_batch(bundle: Bundle) -> None:
    recommender = Recommender(bundle)
    values = (True, 2.0, 2.5, "3e1", "many", "", 10**400, None)
    asked = [RecommendRequest(user_id="u1", context={"device": value}) for value in values]
    assert recommender._table(asked)["device"].to_pylist()[:5] == ["1", "2", "2.5", "3e1", "many"]
    recommender.spec = replace(recommender.spec, context={"device": True})  # as a number
    found = recommender._table(asked)["device"].to_pylist()
    assert found[:6] == [1, 2, 2.5, 30, None, None] and found[7] is None


def test_a_time_without_a_zone_is_utc() -> None:
    naive, aware = (RecommendRequest(user_id="u", timestamp=t) for t in ("2026-01-02", "2026-01-02T00:00Z"))
    assert naive.timestamp == aware.timestamp is not None
