"""The service over real HTTP, without Ray: what a client may send, and what it gets for anything else."""

import json
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from recsys_dist.bundle import Bundle
from recsys_dist.serve.api import Answer, RecommendRequest
from recsys_dist.serve.environment import fast
from recsys_dist.serve.guard import Guard, Limits
from recsys_dist.serve.http import Direct, create_app
from recsys_dist.serve.local import LocalService
from recsys_dist.serve.state import EmbeddedState, canonical_schema, open_state


@contextmanager
def serving(bundle: Bundle, directory: Path, state_url: str | None = None, **options: Any) -> Iterator[str]:
    state = open_state(directory, canonical_schema(bundle), state_url, "model")
    with running(create_app(LocalService(bundle, state, budget_ms=60_000), **options)) as url:
        yield url


@contextmanager
def running(app: Guard) -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def url(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(bundle, tmp_path_factory.mktemp("state"), limits=Limits(body_bytes=200_000)) as found:
        yield found


def call(url: str, body: bytes | dict[str, Any] | None = None, **headers: str) -> tuple[int, Any]:
    data = json.dumps(body).encode() if isinstance(body, dict) else body
    request = urllib.request.Request(url, data, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_recommend_recall_rank_and_version(bundle: Bundle, url: str) -> None:
    status, answer = call(f"{url}/recommend", {"user_id": "u1", "k": 3, "context": {"device": "tv"}})
    assert status == 200 and len(answer["items"]) == 3 and answer["bundle"] == bundle.manifest.version
    status, answer = call(f"{url}/recall", {"user_id": "u1", "k": 4, "include_seen": True})
    assert status == 200 and all(item["recall_score"] is not None for item in answer["items"])
    status, answer = call(f"{url}/rank", {"user_id": "u1", "items": ["i1", "i2"]})
    assert status == 200 and {item["item_id"] for item in answer["items"]} == {"i1", "i2"}
    assert call(f"{url}/version")[1]["models"] == {"recall": "youtubednn", "ranking": "wide_deep"}
    assert call(f"{url}/healthz") == (200, {"status": "ok"})
    assert "/recommend" in call(f"{url}/openapi.json")[1]["paths"]


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("recommend", b"{bad", "body"),
        ("recommend", b'{"user_id": "u1", "k": NaN}', "k"),
        ("recommend", b'{"user_id": "u1", "k": 201}', "k"),
        ("recommend", b'{"user_id": "u1", "candidates": 10000}', "candidates"),
        ("recommend", b'{"user_id": 7}', "user_id"),
        ("recommend", b'{"user_id": ""}', "user_id"),
        ("recommend", b'{"user_id": "\\ud800"}', "user_id"),
        ("recommend", b'{"user_id": "u1", "secret": "do not repeat me"}', "secret"),
        ("recommend", b'{"user_id": "u1", "context": {"device": [1]}}', "context.device"),
        ("recommend", b'{"user_id": "u1", "timestamp": "2020-01-01T00:00:00Z"}', "timestamp"),
        ("recommend", b'{"k": 3}', "user_id"),
        ("rank", b'{"user_id": "u1", "items": []}', "items"),
        ("rank", b'{"user_id": "u1", "items": ["i1", 3]}', "items.1"),
        (
            "events",
            b'{"events": [{"user_id": "u1", "item_id": "i1", "labels": {"click": "perhaps"}}]}',
            "events.0.labels.click",
        ),
        (
            "events",
            b'{"events": [{"user_id": "u1", "item_id": "i1", "labels": {"clik": 1}}]}',
            "events.0.labels.clik",
        ),
        ("events", b'{"events": [{"user_id": "u1", "item_id": "i1", "labels": {"click": 3}}]}', "events.0"),
        (
            "events",
            b'{"events": [{"user_id": "u1", "item_id": "i1", "labels": {},'
            b' "timestamp": "0001-01-01T00:00:00+14:00"}]}',
            "events.0",
        ),
        ("events", b'{"events": [{"user_id": " ", "item_id": "i1", "labels": {"click": 1}}]}', "events.0"),
    ],
)
def test_a_wrong_request_names_the_field_and_repeats_nothing(
    url: str, path: str, body: bytes, field: str
) -> None:
    status, answer = call(f"{url}/{path}", body)
    assert status == 422
    assert [problem["field"] for problem in answer["detail"]] == [field]
    assert "do not repeat me" not in json.dumps(answer)


def test_a_body_that_is_too_large_is_not_parsed(url: str) -> None:
    status, answer = call(f"{url}/recommend", b"[" * 300_000)
    assert status == 413 and "200000 bytes" in answer["detail"]


def test_too_many_items_to_rank_are_refused(url: str) -> None:
    status, answer = call(f"{url}/rank", {"user_id": "u1", "items": ["i1"] * 10_000})
    assert status == 422 and answer["detail"][0]["field"] == "items"


def test_any_script_may_name_a_user(url: str) -> None:
    status, answer = call(f"{url}/recommend", {"user_id": "ünï ✓ 用户", "k": 2})
    assert status == 200 and answer["user_id"] == "ünï ✓ 用户" and len(answer["items"]) == 2


def test_what_is_asked_as_a_form_is_json_all_the_same(url: str) -> None:
    """As curl -d sends it."""
    form = {"content-type": "application/x-www-form-urlencoded"}
    assert call(f"{url}/recommend", b'{"user_id": "u1", "k": 2}', **form)[0] == 200
    status, answer = call(f"{url}/recommend", b'{"user_id": "u1", "k": 0}', **form)
    assert status == 422 and answer["detail"][0]["field"] == "k"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/recommend", {"user_id": "u1", "k": 3, "context": {"device": "tv"}}),
        ("/recall", {"user_id": "u1", "k": 4, "include_seen": True}),
        ("/rank", {"user_id": "u1", "items": ["i1", "nobody knows this", "i2"]}),
    ],
)
def test_what_is_answered_directly_is_what_fastapi_would_answer(
    bundle: Bundle, tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    service = LocalService(bundle, open_state(tmp_path, canonical_schema(bundle), None, "model"))
    guard = create_app(service)
    assert isinstance(guard.app, Direct)
    with running(guard) as direct, running(Guard(guard.app.app, Limits())) as fastapi:
        answers = [call(url + path, body) for url in (direct, fastapi)]
    assert [status for status, _ in answers] == [200, 200]
    mine, theirs = ({**answer, "ms": sorted(answer["ms"])} for _, answer in answers)
    assert mine == theirs


def test_an_unforeseen_error_shows_nothing_of_the_server(bundle: Bundle, tmp_path: Path) -> None:
    class Broken(LocalService):
        async def recommend(self, request: RecommendRequest) -> Answer:
            raise RuntimeError(f"secret {request.user_id}")

    service = Broken(bundle, open_state(tmp_path, canonical_schema(bundle), None, "model"))
    with running(create_app(service)) as url, pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(urllib.request.Request(f"{url}/recommend", b'{"user_id": "u1"}'), timeout=60)
    assert refused.value.code == 500 and refused.value.read() == b"Internal Server Error"


def test_behaviour_counts_from_the_next_request_on(url: str) -> None:
    asked = {"user_id": "newcomer", "k": 5}
    _, before = call(f"{url}/recommend", asked)
    first = before["items"][0]["item_id"]
    event = {"user_id": "newcomer", "item_id": first, "labels": {"click": True}, "context": {"device": "tv"}}
    assert call(f"{url}/events", {"events": [event]}) == (200, {"accepted": 1, "ignored": []})
    misspelt = {**event, "item_id": "i2", "context": {"devise": "tv", "device": "tv"}}
    assert call(f"{url}/events", {"events": [misspelt]}) == (200, {"accepted": 1, "ignored": ["devise"]})
    _, after = call(f"{url}/recommend", asked)
    assert first not in [item["item_id"] for item in after["items"]]
    assert "no_history" in before["degraded"] and "no_history" not in after["degraded"]


def test_the_proxy_repeats_no_events_that_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    state = EmbeddedState(tmp_path, canonical_schema(bundle))
    with running(create_app(LocalService(bundle, state))) as url:
        state.close()
        event = {"user_id": "u1", "item_id": "i1", "labels": {"click": True}, "context": {"device": "tv"}}
        status, answer = call(f"{url}/events", {"events": [event]})
    assert status == 504 and "send them again" in answer["detail"]
    assert str(status) not in fast(tmp_path).get("RAY_SERVE_HAPROXY_RETRY_ON", "").split()


def test_a_token_is_asked_of_all_but_probes(bundle: Bundle, tmp_path: Path) -> None:
    with serving(bundle, tmp_path, token="s3cret") as url:
        assert call(f"{url}/version")[0] == 401
        assert call(f"{url}/version", authorization="Bearer wrong")[0] == 401
        assert call(f"{url}/version", authorization="Bearer s3cret")[0] == 200
        assert call(f"{url}/healthz")[0] == 200


def test_too_many_at_once_are_told_to_come_back(bundle: Bundle, tmp_path: Path) -> None:
    with serving(bundle, tmp_path, limits=Limits(ongoing=0)) as url:
        request = urllib.request.Request(f"{url}/version")
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        assert refused.value.code == 429 and refused.value.headers["retry-after"] == "1"
