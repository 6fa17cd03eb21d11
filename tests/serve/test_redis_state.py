"""What only a server can do to the users' state: go away, hang, refuse, be shared. (The rest: test_state.)"""

import json
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_dist.bundle import Bundle
from recsys_dist.errors import ConfigError, StateError
from recsys_dist.serve.redis_state import RedisState, masked
from recsys_dist.serve.state import canonical_schema, check_state, open_state
from tests.serve.redis_server import Server
from tests.serve.test_http import call, serving
from tests.serve.test_state import event, parts, rows

CLICK = {"user_id": "u1", "item_id": "i1", "labels": {"click": True}, "context": {"device": "tv"}}


@pytest.fixture
def state(bundle: Bundle, server: Server, tmp_path: Path) -> RedisState:
    return RedisState(tmp_path, canonical_schema(bundle), server.url, "model")


def items(*directories: Path) -> list[str]:
    found = pa.concat_tables(pq.read_table(file) for place in directories for file in parts(place))
    return sorted(found["item_id"].to_pylist())


def test_a_server_that_is_killed_fails_no_request_and_keeps_what_it_acknowledged(
    bundle: Bundle, server: Server, tmp_path: Path
) -> None:
    asked = {"user_id": "u1", "k": 3, "context": {"device": "tv"}}
    with serving(bundle, tmp_path, server.url) as url:
        assert call(f"{url}/events", {"events": [CLICK]}) == (200, {"accepted": 1, "ignored": []})
        assert "state_failed" not in call(f"{url}/recommend", asked)[1]["degraded"]
        server.kill()
        for _ in range(2):
            status, answer = call(f"{url}/recommend", asked)
            assert status == 200 and len(answer["items"]) == 3 and "state_failed" in answer["degraded"]
        request = urllib.request.Request(
            f"{url}/events", json.dumps({"events": [CLICK]}).encode(), {"content-type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=60)
        assert refused.value.code == 504 and refused.value.headers["retry-after"] == "1"
        assert b"may not be stored" in refused.value.read()
        server.start()
        assert call(f"{url}/events", {"events": [CLICK]}) == (200, {"accepted": 1, "ignored": []})
        assert server.client.zcard("recsys_dist:model:user:u1") == 2
        ends = time.monotonic() + 10
        while "state_failed" in call(f"{url}/recommend", asked)[1]["degraded"]:
            assert time.monotonic() < ends, "a server that is back is not asked again"
            time.sleep(0.05)


def test_a_server_that_hangs_holds_up_one_read_and_not_the_next(
    bundle: Bundle, server: Server, state: RedisState
) -> None:
    state.append(rows(bundle, event("i1")))
    assert len(state.read(["u1"])) == 1
    server.hang()
    began = time.perf_counter()
    with pytest.raises(StateError, match="cannot be used"):
        state.read(["u1"])
    first = time.perf_counter()
    for _ in range(100):
        with pytest.raises(StateError, match="a moment ago"):
            state.read(["u1"])
    assert 0.04 < first - began < 0.2 and time.perf_counter() - first < 0.2
    server.resume()


def test_events_that_are_refused_are_not_kept_in_part_nor_told_to_the_log(
    bundle: Bundle, server: Server, state: RedisState
) -> None:
    server.client.execute_command("ACL", "SETUSER", "default", "-xadd")
    with pytest.raises(StateError, match="permissions to run the 'xadd'") as refused:
        state.append(rows(bundle, event("i1")))
    assert "timestamp" not in str(refused.value) and not len(state.read(["u1"]))


def test_a_log_whose_writer_was_killed_is_written_again_and_repeats_nothing(
    bundle: Bundle, server: Server, state: RedisState
) -> None:
    state.append(rows(bundle, event("i1"), event("i2", "2024-03-21T10:00:00Z")))
    server.client.execute_command(
        "ACL", "SETUSER", "default", "-xack"
    )  # so it ends before it notes what it wrote
    with pytest.raises(StateError, match="xack"):
        state.write_log()
    assert items(state.directory) == ["i1", "i2"]
    server.client.execute_command("ACL", "SETUSER", "default", "+xack")
    state.append(rows(bundle, event("i3")))
    assert state.write_log() == 3 and state.write_log() == 0
    assert items(state.directory) == ["i1", "i2", "i3"]
    assert server.client.xlen("recsys_dist:model:log") == 0, "what is written takes memory no more"


def test_several_machines_and_processes_write_each_event_once(
    bundle: Bundle, server: Server, tmp_path: Path
) -> None:
    places = [tmp_path / "a", tmp_path / "a", tmp_path / "b"]
    states = [RedisState(place, canonical_schema(bundle), server.url, "model") for place in places]
    one = rows(bundle, event("i1"), event("i2"))

    def work(state: RedisState) -> None:
        for _ in range(10):
            state.append(one)
            state.write_log()

    threads = [threading.Thread(target=work, args=(state,)) for state in states]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    states[0].write_log()
    assert items(tmp_path / "a", tmp_path / "b") == ["i1"] * 30 + ["i2"] * 30
    assert len(states[2].read(["u1"])) == 60


def test_a_server_that_lost_everything_is_written_to_again(
    bundle: Bundle, server: Server, state: RedisState
) -> None:
    state.append(rows(bundle, event("i1")))
    state.write_log()
    server.client.flushall()
    state.append(rows(bundle, event("i2")))
    assert state.write_log() == 1 and items(state.directory) == ["i1", "i2"]


def test_services_of_other_models_do_not_see_each_other(
    bundle: Bundle, server: Server, state: RedisState, tmp_path: Path
) -> None:
    other = RedisState(tmp_path / "other", state.schema, server.url, "other")
    state.append(rows(bundle, event("i1")))
    assert not len(other.read(["u1"])) and other.write_log() == 0
    assert len(state.read(["u1"])) == 1 and state.write_log() == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://u:s3cret@host",
        "s3cret@host",
        "redis://u:s3cret@host:port",
        "redis://u:s3cret@host?no_such_option=1",
    ],
)
def test_a_wrong_address_is_refused_without_showing_its_password(url: str) -> None:
    with pytest.raises(ConfigError, match=r"state_url .* such as redis://host:6379/0") as refused:
        check_state(url, "model")
    assert "s3cret" not in str(refused.value)


def test_an_address_may_be_in_the_environment(
    bundle: Bundle, server: Server, state: RedisState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="the environment of this process has no STATE_ADDRESS"):
        check_state("env:STATE_ADDRESS", "model")
    monkeypatch.setenv("STATE_ADDRESS", server.url)
    check_state("env:STATE_ADDRESS", "model")
    open_state(tmp_path / "other", state.schema, "env:STATE_ADDRESS", "model").append(
        rows(bundle, event("i1"))
    )
    assert len(state.read(["u1"])) == 1


def test_a_server_that_cannot_be_used_is_told_at_the_start(server: Server) -> None:
    check_state(server.url, "model")
    with pytest.raises(
        StateError, match=r"redis://\*\*\*@127\.0\.0\.1:1/0 .* see that the server runs"
    ) as refused:
        check_state("redis://u:s3cret@127.0.0.1:1/0", "model")
    assert "s3cret" not in str(refused.value)
    server.client.config_set("requirepass", "right")
    for wrong in (server.url, f"{server.url}?password=s3cret"):
        with pytest.raises(StateError, match=r"unix:///.* cannot be used: .*password|Auth") as refused:
            check_state(wrong, "model")
        assert "s3cret" not in str(refused.value)
    check_state(f"{server.url}?password=right", "model")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rediss://me:s3cret@host:6380/2?password=s3cret", "rediss://***@host:6380/2"),
        ("valkey://host/1", "valkey://host/1"),
        ("unix://me:s3cret@/run/redis.sock?db=1", "unix://***@/run/redis.sock"),
        ("redis://me:12/s3cret@host", "(not shown)"),
        ("redis://me:s3?cret@host", "(not shown)"),
    ],
)
def test_a_masked_address_has_no_secret(url: str, shown: str) -> None:
    assert masked(url) == shown
