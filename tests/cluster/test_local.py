"""cluster/local.sh: up, a job through the token, down with nothing left behind."""

import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from recsys_dist.data.prepared import Prepared
from recsys_dist.train.checkpoint import load_for_inference

ROOT = Path(__file__).resolve().parent.parent.parent
SCRIPT = ROOT / "cluster/local.sh"


def test_the_script_is_clean() -> None:
    assert os.access(SCRIPT, os.X_OK)
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    if not shutil.which("shellcheck"):
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", SCRIPT], check=True)


def test_usage_is_told() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "local.sh up" in done.stderr and "set -e" not in done.stderr


def local(command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SCRIPT, command], capture_output=True, text=True, env=environment, check=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def processes_naming(text: str) -> list[str]:
    """Command lines of all processes that name `text`."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it has ended
        if text in line:
            found.append(line)
    return found


def submitted(job: str, tmp_path: Path) -> str:
    """What the job printed."""
    ray = ROOT / ".venv/bin/ray"
    command = f"source {tmp_path / 'cluster/env'} && {ray} job submit --working-dir . -- python -m {job}"
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.e2e
@pytest.mark.timeout(900)
def test_two_nodes_take_a_job_with_the_token_and_go_without_a_trace(tmp_path: Path) -> None:
    ports = {"DASHBOARD_PORT": str(free_port()), "GCS_PORT": str(free_port())}
    environment = {**os.environ, **ports, "CLUSTER_DIR": str(tmp_path / "cluster"), "NODES": "2", "CPUS": "1"}
    environment |= {"VENV": str(ROOT / ".venv")}
    if not Path(environment["VENV"], "bin/ray").exists():
        pytest.skip("no .venv beside the code: cluster/local.sh starts the Ray in it")
    assert local("status", environment).returncode == 3
    up = local("up", environment)
    try:
        assert up.returncode == 0, up.stdout + up.stderr
        assert "2 of 2 nodes" in local("status", environment).stdout
        assert "already up" in local("up", environment).stdout
        assert stat.S_IMODE((tmp_path / "cluster/token").stat().st_mode) == 0o600
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(f"http://127.0.0.1:{ports['DASHBOARD_PORT']}/api/jobs/", timeout=30)
        data, settings = tmp_path / "data", "num_workers=2 epochs=1 refit=false model.hidden=[8]"
        said = submitted(f"jobs.prepare simulate --out {data} source.events=2000 buckets=2", tmp_path)
        assert "2,000 rows read" in said
        # a node has one CPU, so the two workers are on two nodes
        said = submitted(f"jobs.train wide_deep data={data} {settings} --out {tmp_path / 'train'}", tmp_path)
        [checkpoint] = re.findall(r"checkpoint: (\S+)", said)
        _, manifest = load_for_inference(Path(checkpoint))
        rows = Prepared.open(data).shards("ranking/train").total_rows
        assert manifest.workers == 2 and manifest.history[0]["trained_rows"] == rows
        temp = f"recsys-{os.getuid()}-{ports['GCS_PORT']}"
        assert processes_naming(temp), "the check below can see them"
    finally:
        down = local("down", environment)
    assert down.returncode == 0 and down.stdout == "down\n", down.stderr
    assert processes_naming(temp) == [] and local("status", environment).returncode == 3
    assert not Path("/tmp", temp).exists()
    assert local("down", environment).stdout == "nothing to end\n"


def test_what_does_not_come_up_leaves_nothing_behind(tmp_path: Path) -> None:
    """As where something else listens at the dashboard's port: the node lives, and nobody answers as it."""
    fakes = {"ray": "exec /bin/sleep 300", "sleep": "true"}
    fakes["python"] = f'[ "$1" = - ] || exec {sys.executable} "$@"; false'
    for name, does in fakes.items():
        file = tmp_path / "venv/bin" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{does}\n")
        file.chmod(0o755)
    places = {"CLUSTER_DIR": str(tmp_path / "cluster"), "TMPDIR": str(tmp_path)}
    environment = {**os.environ, **places, "VENV": str(tmp_path / "venv")}
    done = local("up", environment)
    assert done.returncode == 1 and "the cluster did not come up" in done.stderr
    assert not processes_naming(str(tmp_path / "venv"))
    assert local("status", environment).returncode == 3
