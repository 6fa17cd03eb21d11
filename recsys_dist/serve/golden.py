"""Golden requests: asked when a bundle is made, asked again wherever it is loaded."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np

from recsys_dist.bundle import Bundle
from recsys_dist.data import transforms
from recsys_dist.errors import BundleError
from recsys_dist.serve.api import Answer, RecommendRequest
from recsys_dist.serve.recommend import Recommender

_USERS = 8
_PREDICTED = ("probability", "expected_value")  # one of them, as the ranker has it
_CLOSE = 1e-4  # scores of another CPU's arithmetic may differ by so much
_BUDGET_MS = 600_000.0


def ask(bundle: Bundle) -> list[dict[str, Any]]:
    """Requests of users spread over those that the bundle knows, and of a stranger, with their answers."""
    known = bundle.seen["user_id"]
    chosen = [known[int(at)].as_py() for at in np.linspace(0, len(known) - 1, min(_USERS, len(known)))]
    as_of = _first_moment_after(bundle)
    asked = [RecommendRequest(user_id=user, timestamp=as_of) for user in [*chosen, "nobody"]]
    return [
        {"request": request.model_dump(mode="json"), "answer": _kept(answer)}
        for request, answer in zip(asked, _answers(bundle, asked), strict=True)
    ]


def requests(bundle: Bundle) -> list[RecommendRequest]:
    """Those that came with the bundle; BundleError where it has none."""
    if not bundle.golden:
        raise BundleError(f"bundle {str(bundle.path)!r} has no golden requests; export it anew")
    return [RecommendRequest.model_validate(case["request"]) for case in bundle.golden]


def replay(bundle: Bundle) -> None:
    """BundleError where the bundle answers otherwise than when it was made."""
    for case, answer in zip(bundle.golden, _answers(bundle, requests(bundle)), strict=True):
        found, expected = _kept(answer), case["answer"]
        same = [item["item_id"] for item in found] == [item["item_id"] for item in expected]
        if not same and not _tied(found, expected):
            raise BundleError(
                f"bundle {str(bundle.path)!r} recommends {[i['item_id'] for i in found]} to user "
                f"{answer.user_id!r} and not {[i['item_id'] for i in expected]}, as when it was made; "
                "export it anew with this version of the program"
            )
        _compare(bundle, found, expected)


def _compare(bundle: Bundle, found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for score in (*_PREDICTED, "recall_score"):
        pairs = [(a[score], b[score]) for a, b in zip(found, expected, strict=True) if a[score] is not None]
        far = max((_apart(a, b, score) for a, b in pairs), default=0.0)
        if not far <= _CLOSE:
            raise BundleError(
                f"bundle {str(bundle.path)!r} gives a {score} that is {far:g} off its golden answer, over "
                f"{_CLOSE:g}; export it anew with this version of the program"
            )


def _answers(bundle: Bundle, asked: list[RecommendRequest]) -> list[Answer]:
    answers = Recommender(bundle).recommend(asked, _BUDGET_MS)
    with ThreadPoolExecutor(1) as thread:  # the caller's may be in an event loop already
        return thread.submit(asyncio.run, answers).result()


def _kept(answer: Answer) -> list[dict[str, Any]]:
    return [item.model_dump(mode="json") for item in answer.items]


def _tied(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    """The lists differ only where scores are as good as equal."""
    pairs = zip(found, expected, strict=False)
    return len(found) == len(expected) and all(
        any(
            a[of] is not None and b[of] is not None and _apart(a[of], b[of], of) <= _CLOSE
            for of in _PREDICTED
        )
        for a, b in pairs
    )


def _apart(a: float, b: float, score: str) -> float:
    """Of amounts the part of them, as they may be thousands; of other scores the difference."""
    return abs(a - b) / (max(1, abs(b)) if score == "expected_value" else 1)


def _first_moment_after(bundle: Bundle) -> datetime:
    """After all that the bundle knows of: its newest event and the day that its statistics froze."""
    frozen = datetime.fromtimestamp(bundle.encoders.freeze_day * transforms.DAY_US / 1e6, UTC)
    newest = max((bundle.events["timestamp"].to_pylist()), default=frozen)
    return max(newest, frozen + timedelta(days=1)) + timedelta(seconds=1)
