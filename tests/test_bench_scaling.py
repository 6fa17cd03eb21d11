"""What `jobs.bench_scaling` counts and puts on paper, beside numbers counted by hand."""

from pathlib import Path

import pytest

from jobs import bench_scaling, scaling_page, scaling_paper
from jobs.bench_workers import ids_and_floats
from jobs.cost_model import Machine, Spread, Table, Work
from recsys_dist.models import mlp

RATES = {"gather": 1e9, "flops": 1e10, "stream": 1e10}


def test_what_a_model_asks_per_row() -> None:
    """Three ids with vectors of 8, and 8 floats, into layers of 32 x 16 and 16 x 1."""
    cfg, schema = mlp.Config(embedding_dim=8, hidden=(16,)), ids_and_floats(3, 100)
    work, step, placed = bench_scaling.counted(cfg, schema, 64, (1, 2))
    assert (work.id_bytes, work.table_bytes, work.vector_bytes) == (3 * 4, 3 * 8 * 4, 3 * 8 * 4)
    assert work.flops == 6 * (32 * 16 + 16), "two per product, forward and for both gradients"
    assert work.dense_bytes == 4 * (32 * 16 + 16 + 16 + 1)
    spread = bench_scaling.spread_of(placed[2], step, 2)
    assert spread.busiest == spread.sent == pytest.approx(4 / 3), "two of three tables on one of two workers"


def test_a_terabyte_on_paper(tmp_path: Path) -> None:
    work = Work(id_bytes=104, table_bytes=13_312, vector_bytes=13_312, flops=1e7, dense_bytes=1e7)
    tables = [Table(75_000_000, 1.0, 128)] * 26
    points = scaling_paper.on_paper({"DLRM": scaling_paper.Asked(work, tables)}, 1e6, seed=0)
    found = {(p.gpus, p.kind): p for p in points}
    whole = found[64, "table_wise"]
    assert whole.held_bytes == 75_000_000 * 129 * 4 and whole.fits
    assert whole.spread.busiest == pytest.approx(64 / 26)
    assert not found[8, "table_wise"].fits, "four tables of 39 GB on one GPU of 80"
    assert whole.step_s == pytest.approx(max(whole.unfed_s, 8192 / 1e6))
    fastest = {p.gpus: p for p in scaling_paper.best(points)}
    assert (
        fastest[512].kind == "column_wise" and fastest[512].phases["exchange"] < whole.phases["exchange"] * 8
    )
    by_rows = found[
        64, "row_wise"
    ]  # each worker sends a part of every sum: of 64 parts of a batch, 7/8 of them far
    sent = 8192 * (104 + 2 * 13_312 * 64)
    assert by_rows.phases["exchange"] == pytest.approx(sent * 56 / 64 / 40e9, rel=0.01)

    slow = {**RATES, "flops": 1e9, "send": 1e8, "latency_s": 3e-3}
    two = [{**RATES, "send": 2e8, "latency_s": 1e-3}, slow]
    of_two = bench_scaling.machine_of([*two, *two], 1e5, 2)
    assert vars(of_two) == pytest.approx(vars(Machine(1e5, 1e9, 1e9, 1e10, 1e8, 1e8, 2, 3e-3)))
    machine = bench_scaling.machine_of([RATES, {**RATES, "gather": 3e9}], 1e5, 1)
    assert (machine.gather, machine.group) == (pytest.approx(1.5e9), 1)
    counted_s = 1000 * (1e-5 + 3 * 13_312 / 1.5e9 + 1e7 / 1e10) + 7 * 1e7 / 1e10
    took = [counted_s * times for times in (1.5, 2.0, 4.0)]
    runs = [{"1": {"machine": vars(machine), "measured_s": seconds}} for seconds in took]
    runs = bench_scaling.predicted(runs, work, {1: Spread()}, 1000)
    assert [run["1"]["predicted_s"] for run in runs] == pytest.approx([2 * counted_s] * 3), "fits the median"
    told = {"hardware": {"cpus": 2}, "load": 1.0, "date": "2026-11-23", "batch_rows": 1000}
    result = {**told, "models": {"wide_deep": {"repeats": runs}}}
    scaling_page.write(tmp_path / "scaling.md", result, points)
    page = (tmp_path / "scaling.md").read_text()
    assert "0.50 (0.25..0.67)" in page and "1.00 (0.50..1.33)" in page and "50% is not met" in page
    assert "DLRM on 8 GPUs, the tables fit in no way" in page
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "scaling_predicted_rows.svg",
        "scaling_dlrm_phases.svg",
    }
