"""`jobs.serve --no-ray` as a user runs it: what it keeps, and what it says of mistakes."""

import errno
import socket
import time
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
import uvicorn

from jobs import serve as job
from jobs.command import reported
from recsys_dist.bundle import Bundle
from recsys_dist.data.sources import parquet
from recsys_dist.serve.state import EmbeddedState, canonical_schema
from tests.serve.test_state import event, rows


def serve(bundle: Bundle, state: Path, *arguments: str) -> int:
    return reported(job.main, ["--no-ray", "--bundle", str(bundle.path), "--state", str(state), *arguments])


@pytest.mark.parametrize(
    ("host", "port", "said"),
    [
        ("127.0.0.1", None, "Address already in use"),
        ("127.0.0.1", 99999, "--port 99999 is no port: they go from 0 to 65535"),
        ("192.0.2.1", 8000, "cannot listen on 192.0.2.1:8000: "),
    ],
)
def test_where_it_cannot_listen_is_told_in_one_line(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str], host: str, port: int | None, said: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        at = busy.getsockname()[1] if port is None else port
        assert serve(bundle, tmp_path, "--host", host, "--port", str(at)) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_without_ray_events_become_a_log_too(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def clicked(*_: Any) -> None:
        EmbeddedState(tmp_path, canonical_schema(bundle)).append(rows(bundle, event("i1")))

    monkeypatch.setattr(uvicorn.Server, "run", clicked)
    assert serve(bundle, tmp_path, "--port", "0") == 0
    assert pq.read_table(tmp_path / "events")["item_id"].to_pylist() == ["i1"]
    assert parquet.recognise(str(tmp_path)) is not None


def test_a_log_that_cannot_be_written_now_is_written_later(capsys: pytest.CaptureFixture[str]) -> None:
    class FullAtFirst:
        tries = 0

        def write_log(self) -> None:
            self.tries += 1
            if self.tries == 1:
                raise OSError(errno.ENOSPC, "No space left on device")

    state = FullAtFirst()
    with job._recording(cast("EmbeddedState", state), 0.01):
        deadline = time.monotonic() + 10
        while state.tries < 3:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    assert "the log waits: [Errno 28] No space left on device" in capsys.readouterr().err
