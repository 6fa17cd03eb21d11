"""Measures training: what a second worker gains, what loading costs, and what others do.

  python -m jobs.bench_train --json bench.json
  python -m jobs.bench_train --models all --json models.json

Wide & Deep on made-up rows, a global batch of 4,096, one thread per worker. In the same run, interleaved:
loader-only (Ray Data and collate), step-only (batches made before), end-to-end (both), each with one and
two workers, beside a plain PyTorch loop (nn.EmbeddingBag, torch optimizers) on tensors sliced before.

With --models, instead: one worker's rows per second of each model, beside plain PyTorch, torch-rechub and
deepctr-torch; see jobs/bench_models.py.
"""

import argparse
import datetime as dt
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from jobs import bench_models
from jobs.bench_workers import BENCH_SCHEMA, BenchWorker, free_port
from jobs.command import reported
from recsys_dist import session
from recsys_dist.config import rng_for
from recsys_dist.schema import Sequence

TOWERS = {"256-128": (256, 128), "1024-512-256": (1024, 512, 256)}
REQUIRED = {"256-128": 1.3, "1024-512-256": 1.6}  # two workers over one, end to end
LOADER_SHARE_AT_MOST = 0.1


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.models:
        result = bench_models.compare(args)
        print(bench_models.table(result))
    else:
        session.connect()
        with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
            files = write_shards(Path(folder), args.steps * args.batch_rows, args.batch_rows * 8)
            result = measure(files, args)
        print(table(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench_train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--steps", type=int, help="steps of one measurement (default: 40, with --models 8)")
    parser.add_argument("--repeats", type=int, default=5, help="of everything, interleaved")
    parser.add_argument("--batch-rows", type=int, default=4096, help="rows of a global batch")
    parser.add_argument("--towers", default=",".join(TOWERS), help="which of them (default: %(default)s)")
    parser.add_argument("--models", metavar="NAMES", help="'all', or models with commas between")
    parser.add_argument("--threads", type=int, default=2, help="of each process, with --models")
    parser.add_argument(
        "--environments", metavar="DIR", default="runs/bench", help="where --models installs the libraries"
    )
    args = parser.parse_args(argv)
    args.steps = args.steps or (8 if args.models else 40)
    return args


def write_shards(folder: Path, rows: int, shard_rows: int) -> list[tuple[str, int]]:
    """Made-up training shards of `BENCH_SCHEMA`; ids are Zipf-like, histories have 10 items on average."""
    files = []
    for number, start in enumerate(range(0, rows, shard_rows)):
        size = min(shard_rows, rows - start)
        rng = rng_for(0, "bench", number)
        columns: dict[str, Any] = {}
        for feature in BENCH_SCHEMA.ids:
            assert feature.rows is not None
            lengths = rng.integers(0, 21, size) if isinstance(feature, Sequence) else np.ones(size, np.int64)
            ids = (feature.rows ** rng.random(lengths.sum())).astype(np.int32)
            offsets = np.r_[0, np.cumsum(lengths)].astype(np.int32)
            is_list = isinstance(feature, Sequence)
            columns[feature.name] = pa.ListArray.from_arrays(offsets, ids) if is_list else ids
        columns |= {feature.name: rng.normal(size=size).astype(np.float32) for feature in BENCH_SCHEMA.dense}
        columns["click"] = rng.integers(0, 2, size).astype(np.float32)
        columns["row_id"] = (np.int64(number) << 32) + np.arange(size)
        file = folder / f"part-{number:05d}.parquet"
        pq.write_table(pa.table(columns), file)
        files.append((str(file), size))
    return files


def measure(files: list[tuple[str, int]], args: argparse.Namespace) -> dict[str, Any]:
    """Rows per second of each measurement: every repeat, and the median."""
    actor: Any = ray.remote(num_cpus=0)(BenchWorker)
    groups = {1: [actor.remote()], 2: [actor.remote(), actor.remote()]}
    for world, group in groups.items():
        port = free_port()
        joined = [w.join.remote(r, world, port, args.batch_rows, files) for r, w in enumerate(group)]
        ray.get(joined)
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    for tower in args.towers.split(","):
        for group in groups.values():
            ray.get([worker.build.remote(TOWERS[tower]) for worker in group])
        kinds = [*itertools.product(("loader", "step", "end_to_end"), groups), ("plain", 1)]
        for _, (kind, world) in itertools.product(range(args.repeats + 1), kinds):  # the first warms up
            found = ray.get([worker.measure.remote(kind) for worker in groups[world]])
            runs.setdefault(tower, {}).setdefault(f"{kind}_{world}", []).append(combined(found))
    kept = {tower: {name: found[1:] for name, found in kinds.items()} for tower, kinds in runs.items()}
    return {
        "hardware": {
            "cpu": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
        },
        "date": dt.date.today().isoformat(),
        "batch_rows": args.batch_rows,
        "towers": {tower: figures(kinds) | {"repeats": kinds} for tower, kinds in kept.items()},
    }


def combined(found: list[dict[str, float]]) -> dict[str, float]:
    """Of all workers: rows add up, the slowest sets the time."""
    seconds = max(one["seconds"] for one in found)
    loader_s = statistics.mean(one["loader_s"] for one in found)
    return {
        "rows_per_s": sum(one["rows"] for one in found) / seconds,
        "loader_share": loader_s / seconds,
    }


def figures(kinds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, and the ratios that are asked for; a ratio is the median of the repeats' own ratios."""

    def ratio(over: str, under: str) -> float:
        pairs = zip(kinds[over], kinds[under], strict=True)
        return statistics.median(a["rows_per_s"] / b["rows_per_s"] for a, b in pairs)

    rates = {name: statistics.median(one["rows_per_s"] for one in found) for name, found in kinds.items()}
    shares = {w: statistics.median(one["loader_share"] for one in kinds[f"end_to_end_{w}"]) for w in (1, 2)}
    return {
        "rows_per_s": rates,
        "two_workers_over_one": ratio("end_to_end_2", "end_to_end_1"),
        "two_workers_over_one_steps_only": ratio("step_2", "step_1"),
        "one_worker_over_plain_pytorch": ratio("end_to_end_1", "plain_1"),
        "loader_share_of_step": {"1": shares[1], "2": shares[2]},
    }


def table(result: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"rows per second, median, batch {result['batch_rows']}, {result['date']}, {result['hardware']}"]
    for tower, found in result["towers"].items():
        lines.append(f"\n{tower} tower")
        lines += [f"  {name:>14}  {rate:>10,.0f}" for name, rate in found["rows_per_s"].items()]
        gain, share = found["two_workers_over_one"], max(found["loader_share_of_step"].values())
        lines += [
            f"  two workers over one: {gain:.2f} (required {REQUIRED[tower]}), "
            f"steps only {found['two_workers_over_one_steps_only']:.2f}",
            f"  loading: {share:.1%} of a step (required < {LOADER_SHARE_AT_MOST:.0%})",
            f"  one worker over plain PyTorch: {found['one_worker_over_plain_pytorch']:.2f}",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(reported(main, sys.argv[1:]))
