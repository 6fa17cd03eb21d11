"""The cost model beside numbers counted by hand."""

import pytest

from jobs.cost_model import (
    PHASES,
    Machine,
    Spread,
    Table,
    Work,
    fitted,
    limit_s,
    simulated,
    step_seconds,
    total_s,
    zipf,
)
from recsys_dist.config import rng_for

WORK = Work(id_bytes=40, table_bytes=1000, vector_bytes=500, flops=1e5, dense_bytes=1e6)
MACHINE = Machine(
    loader=1e5, gather=1e9, flops=1e10, stream=7e9, near=1e8, far=1e7, group=2, latency_s=1e-3, step_s=2e-3
)


def test_one_worker() -> None:
    """1,000 rows: 10 ms to load, 3 MB of table rows, 10^8 flops, 7 passes over 1 MB."""
    found = step_seconds(WORK, MACHINE, 1000, 1)
    expected = (0.01, 0.003, 0, 0.01, 0, 0.001, 0.002)
    assert found == pytest.approx(dict(zip(PHASES, expected, strict=True)))
    assert total_s(found, ahead=False) == pytest.approx(0.026)
    assert total_s(found, ahead=True) == pytest.approx(0.016)
    assert limit_s(WORK, MACHINE, 1000) == pytest.approx(0.013)


def test_two_workers_of_one_machine_and_four_of_two() -> None:
    two = step_seconds(WORK, MACHINE, 1000, 2, Spread(busiest=1.5))
    assert two["lookup"] == pytest.approx(0.0015 * 1.5) and two["dense"] == pytest.approx(0.005)
    # 500 rows of 1,040 bytes, all of which travel "near", own share included; four collectives
    assert two["exchange"] == pytest.approx(500 * 1040 / 1e8 + 4e-3)
    assert two["all-reduce"] == pytest.approx(1e6 / 1e8 + 1e-3)  # 2 (2 - 1) / 2 of 1 MB
    four = step_seconds(WORK, MACHINE, 1000, 4, Spread(sent=2, copies=3))
    sent = 250 * (3 * 40 + 2 * 500 * 2)
    assert four["exchange"] == pytest.approx(sent / 2 / 1e7 + 4e-3), "half of it between machines"
    assert four["all-reduce"] == pytest.approx(1e6 / 1e8 + 1e6 / 2 / 1e7 + 1e-3)


def test_a_fitted_machine_takes_what_was_measured() -> None:
    slower = fitted(WORK, MACHINE, 1000, 0.05)
    assert total_s(step_seconds(WORK, slower, 1000, 1), ahead=False) == pytest.approx(0.05)
    assert slower.row_s == pytest.approx((0.05 - 0.026) / 1000)


def test_zipf_draws_by_rank() -> None:
    drawn = zipf(rng_for(0, "zipf"), 1000, 1.2, 200_000)
    assert drawn.min() == 0 and drawn.max() < 1000
    power = -0.2  # share of the first ten of the continuous distribution: (11^p - 1) / (1000^p - 1)
    assert (drawn < 10).mean() == pytest.approx((11**power - 1) / (1000**power - 1), abs=0.005)


def test_what_a_placement_does_to_the_load() -> None:
    rng, tables = rng_for(0, "spread"), [Table(1_000_000, 1.0, 8)] * 4
    assert simulated(tables, "table_wise", 8, 1000, 1.1, rng) == Spread(2.0, 2.0, 1, 2.0)  # half have none
    assert simulated(tables, "column_wise", 8, 1000, 1.1, rng) == Spread(1.0, 1.0, 2, 1.0)
    narrow = simulated(tables, "column_wise", 32, 1000, 1.1, rng)  # 2 pieces of 4 columns each: 8 of 32
    assert (narrow.busiest, narrow.copies) == (4.0, 2)
    by_rows = simulated(tables, "row_wise", 8, 10_000, 1.1, rng)
    hashed = simulated(tables, "row_hashed", 8, 10_000, 1.1, rng)
    first = zipf(rng, 1_000_000, 1.1, 200_000) < 125_000  # the most frequent rows all lie on one worker
    assert by_rows.busiest == pytest.approx(8 * first.mean(), rel=0.02)
    assert 1 < hashed.busiest < by_rows.busiest / 2 and by_rows.sent == hashed.sent == 8
    seldom = simulated([Table(1000, 1.0, 8), Table(1000, 3.0, 8)], "table_wise", 2, 1000, 1.1, rng)
    assert (seldom.busiest, seldom.fullest) == (1.5, 1.0)
