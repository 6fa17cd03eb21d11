"""The service as it is run: Ray Serve, replicas killed, champions swapped, and nothing left behind."""

from pathlib import Path

import psutil
import pytest

from jobs import bench_faults
from recsys_dist.bundle import Bundle


@pytest.mark.e2e
@pytest.mark.timeout(600)
def test_no_request_fails_while_replicas_die_and_champions_change(bundle: Bundle, tmp_path: Path) -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    found = bench_faults.measure(bundle, bundle.seen["user_id"].to_pylist(), tmp_path, least_requests=500)
    assert found["failed"] == 0 and found["requests"] >= 500, found
    assert len(found["bundles"]) == 2, "the former and the new champion, and never the bad one"
    assert "golden answer" in found["faults"]["bad champion"]
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before
