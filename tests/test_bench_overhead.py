"""The benchmarks of what training costs on top of TorchRec, in memory, and for checkpoints."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray

from jobs import bench_checkpoint, bench_overhead, bench_train
from recsys_dist.errors import ConfigError


def test_overheads_are_medians_of_repeats() -> None:
    theirs = [{"seconds": 1.0, "cpu_s": 0.5}, {"seconds": 2.0, "cpu_s": 0.5}, {"seconds": 4.0, "cpu_s": 0.5}]
    ours = [{"seconds": 1.1, "cpu_s": 0.6}, {"seconds": 2.0, "cpu_s": 0.6}, {"seconds": 4.8, "cpu_s": 0.6}]
    repeats = dict.fromkeys(bench_overhead.THEIRS, theirs) | dict.fromkeys(bench_overhead.OURS, ours)
    found = bench_overhead.figures(repeats, rows=1000)
    assert found["rows_per_s"]["torchrec"] == 500 and found["cpu_us_per_row"]["run"] == pytest.approx(600)
    over = found["overhead"]["end_to_end over tuned, seconds"]
    assert over == pytest.approx({"median": 0.1, "low": 0.05, "high": 0.15})
    told = {"batch_rows": 4096, "date": "2026-11-23", "hardware": {}, "load": 1.0, "workers": {1: found}}
    assert "+10.0% (+5.0%..+15.0%)" in bench_overhead.table(told)


@pytest.fixture
def ended() -> Iterator[None]:
    """The cluster that a job leaves to the end of its process."""
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("ended")
def test_our_kinds_are_measured_beside_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_worker_niceness", "0")  # which the job sets for good
    few = ["--steps", "2", "--repeats", "1", "--batch-rows", "64"]
    found = bench_overhead.compare(bench_train.parse(["--overhead", *few]))
    kinds = {*bench_overhead.THEIRS, *bench_overhead.OURS}
    for world in (1, 2):
        of = found["workers"][world]
        assert set(of["repeats"]) == set(of["rows_per_s"]) == kinds and min(of["cpu_us_per_row"].values()) > 0
    remembered = bench_overhead.memory(bench_train.parse(["--memory", "--rows", "600", *few]))
    assert [one["rows"] for each in remembered["repeats"].values() for one in each] == [1024, 10240]
    assert "at 10 times the rows" in bench_overhead.memory_table(remembered)


@pytest.mark.e2e
def test_saves_are_timed(tmp_path: Path) -> None:
    sizes = {"--table-rows": 1000, "--batch-rows": 64, "--steps": 3, "--saves": 2, "--increments": 2}
    words = [*(str(word) for pair in sizes.items() for word in pair), "--json", str(tmp_path / "found.json")]
    subprocess.run([sys.executable, "-m", "jobs.bench_checkpoint", *words], check=True)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["size_bytes"] > 8 * 1000 * 33 * 4 and len(found["saves"]) == 2
    for save in found["saves"]:
        assert save["stall_s"] > 0 and save["write_s"] > 0
        assert save["lost_of_a_minute"] >= save["stall_of_a_minute"] == pytest.approx(save["stall_s"] / 60)
    first, second = found["increments"]
    assert 0 < first["of_full"] < second["of_full"] < 1 and 0 < found["marking_ms"] < found["step_ms"]


def test_the_rows_that_some_draws_touch_are_those_that_they_do() -> None:
    drawn = (1000 ** np.random.default_rng(0).random((200, 500))).astype(int)
    found = np.mean([len(np.unique(ids)) for ids in drawn]) / 1000
    assert bench_checkpoint.touched(1000, 500) == pytest.approx(found, rel=0.02)


def test_a_model_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"memory has .* GB free and 4000000\.0 are needed"):
        bench_checkpoint.refuse_without_room(10**15, tmp_path)
