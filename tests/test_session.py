import os
import socket
import subprocess
import sys

import pytest

from recsys_dist import session
from recsys_dist.errors import ClusterError


def test_a_cluster_that_is_not_there_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed_again:
        port = closed_again.getsockname()[1]
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{port}")
    with pytest.raises(ClusterError, match=rf"RAY_ADDRESS='127.0.0.1:{port}'.*unset RAY_ADDRESS"):
        session.connect()


def test_the_address_for_submitting_jobs_is_no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:8265")
    with pytest.raises(ClusterError, match="Invalid Ray address"):
        session.connect()


def test_a_cluster_started_here_listens_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_GCS_SERVER_PORT", "7001")
    own = session._own_address()
    assert own.keys() == {"RAY_ADDRESS"}, "the user's variable is neither replaced nor removed afterwards"
    assert own["RAY_ADDRESS"].endswith(":7001")


@pytest.mark.ray
def test_processes_of_a_cluster_started_here_know_its_address_and_the_driver_keeps_its_environment() -> None:
    code = (
        "import os, ray; from recsys_dist import session; session.connect()\n"
        "asked = ray.remote(lambda: os.environ['RAY_ADDRESS']).remote()\n"
        "assert ray.get(asked) == ray.get_runtime_context().gcs_address\n"
        "assert 'RAY_ADDRESS' not in os.environ and 'RAY_GCS_SERVER_PORT' not in os.environ\n"
        "import pyarrow as pa\n"
        "pool = ray.get(ray.remote(lambda: pa.default_memory_pool().backend_name).remote())\n"
        "assert pool == 'jemalloc' or 'jemalloc' not in pa.supported_memory_backends(), pool\n"
    )
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    subprocess.run([sys.executable, "-c", code], env=alone, check=True, timeout=120)
