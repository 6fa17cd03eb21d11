"""Measures training: what a second worker gains, what loading costs, and what others do.

  python -m jobs.bench_train --json bench.json
  python -m jobs.bench_train --models all --json models.json
  python -m jobs.bench_train --overhead --json overhead.json
  python -m jobs.bench_train --memory --json memory.json

Wide & Deep on made-up rows, a global batch of 4,096, one thread per worker. In the same run, interleaved:
loader-only (Ray Data and collate), step-only (batches made before), end-to-end (both), each with one and
two workers, beside a plain PyTorch loop (nn.EmbeddingBag, torch optimizers) on tensors sliced before; and
the time that lookups and matrix products would take at the machine's own rates, measured between.

With --gpu each worker has a GPU, and so have the plain loop and the machine's rates; two workers are measured
where there are three of them, for all groups live at once.

Instead, with
--models    one worker's rows per second of each model, beside plain PyTorch, torch-rechub and deepctr-torch;
            see jobs/bench_models.py
--overhead  what our loop, Ray Data and a run's progress cost on top of TorchRec alone, by 1 and 2 workers
--memory    peak memory of a worker on some rows and on ten times as many; see jobs/bench_overhead.py for both
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

import ray
import torch

from jobs import bench_models, bench_overhead
from jobs.bench_scaling import LIMIT_AT_LEAST, counted, machine_of
from jobs.bench_workers import BENCH_SCHEMA, combined, started, write_shards
from jobs.command import reported
from jobs.cost_model import limit_s
from recsys_dist import session
from recsys_dist.config import nearest
from recsys_dist.data.output import write_text
from recsys_dist.errors import ConfigError
from recsys_dist.models.wide_deep import Config

TOWERS = {"256-128": (256, 128), "1024-512-256": (1024, 512, 256)}
REQUIRED = {"256-128": 1.3, "1024-512-256": 1.6}  # two workers over one, end to end
LOADER_SHARE_AT_MOST = 0.1


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.models:
        result = bench_models.compare(args)
        print(bench_models.table(result))
    elif args.overhead:
        result = bench_overhead.compare(args)
        print(bench_overhead.table(result))
    elif args.memory:
        result = bench_overhead.memory(args)
        print(bench_overhead.memory_table(result))
    else:
        session.connect()
        with tempfile.TemporaryDirectory(prefix="bench-train-") as folder:
            files = write_shards(
                Path(folder), args.steps * args.batch_rows, args.batch_rows * 8, BENCH_SCHEMA
            )
            result = measure(files, args)
        print(table(result))
    if args.json:
        write_text(json.dumps(result, indent=1), Path(args.json))


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
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("--models", metavar="NAMES", help="'all', or models with commas between")
    parser.add_argument("--overhead", action="store_true", help="beside TorchRec alone")
    parser.add_argument("--memory", action="store_true", help="of few rows and of many")
    parser.add_argument("--rows", type=int, default=300_000, help="the few, with --memory")
    parser.add_argument("--threads", type=int, default=2, help="of each process, with --models")
    parser.add_argument(
        "--environments", metavar="DIR", default="runs/bench", help="where --models installs the libraries"
    )
    args = parser.parse_args(argv)
    args.steps = (8 if args.models else 40) if args.steps is None else args.steps
    for tower in args.towers.split(","):
        if tower not in TOWERS:
            raise ConfigError(f"--towers {tower!r} is not measured{nearest(tower, list(TOWERS))}")
    if args.gpu and (args.models or args.overhead or args.memory):
        raise ConfigError("--gpu: models, overhead and memory are measured on CPUs alone; leave one out")
    for name in ("steps", "repeats", "batch_rows", "rows", "threads"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1 is needed")
    return args


def worlds(gpu: bool) -> list[int]:
    """By how many workers is measured; ConfigError where each should have a GPU and there is none."""
    if not gpu:
        return [1, 2]
    if not torch.cuda.is_available():
        raise ConfigError("--gpu: PyTorch sees no GPU; leave it out, or install with `make install CUDA=1`")
    return [1, 2] if torch.cuda.device_count() >= 3 else [1]


def measure(files: list[tuple[str, int]], args: argparse.Namespace) -> dict[str, Any]:
    """Rows per second of each measurement: every repeat, and the median."""
    groups = {world: started(world, args.batch_rows, files, gpu=args.gpu) for world in worlds(args.gpu)}
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    limits: dict[str, list[float]] = {}
    gains: dict[str, list[float]] = {"flops": [], "gather": []}
    for tower in args.towers.split(","):
        work, _, _ = counted(Config(hidden=TOWERS[tower]), BENCH_SCHEMA, args.batch_rows, ())
        for group in groups.values():
            ray.get([worker.build.remote(Config(hidden=TOWERS[tower])) for worker in group])
        kinds = [*itertools.product(("loader", "step", "end_to_end"), groups), ("plain", 1)]
        for _ in range(args.repeats + 1):  # the first warms up
            for kind, world in kinds:
                found = ray.get([worker.measure.remote(kind) for worker in groups[world]])
                runs.setdefault(tower, {}).setdefault(f"{kind}_{world}", []).append(combined(found))
            alone, *side_by_side = [ray.get([w.limits.remote() for w in group]) for group in groups.values()]
            machine = machine_of(alone, 1.0, 1)
            took = args.batch_rows / runs[tower]["end_to_end_1"][-1]["rows_per_s"]
            limits.setdefault(tower, []).append(limit_s(work, machine, args.batch_rows) / took)
            for kind, together in itertools.product(gains, side_by_side):
                gains[kind].append(sum(one[kind] for one in together) / alone[0][kind])
    kept = {tower: {name: found[1:] for name, found in kinds.items()} for tower, kinds in runs.items()}
    return {
        "hardware": {
            "cpu": platform.processor() or platform.machine(),
            "cpus": os.cpu_count(),
            **({"gpu": torch.cuda.get_device_name()} if args.gpu else {}),
        },
        "date": dt.date.today().isoformat(),
        "batch_rows": args.batch_rows,
        "machine_two_over_one": {kind: statistics.median(found) for kind, found in gains.items() if found},
        "towers": {
            tower: figures(kinds) | {"limit": statistics.median(limits[tower][1:]), "repeats": kinds}
            for tower, kinds in kept.items()
        },
    }


def figures(kinds: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Medians, and the ratios that are asked for; a ratio is the median of the repeats' own ratios."""

    def ratio(over: str, under: str) -> float:
        pairs = zip(kinds[over], kinds[under], strict=True)
        return statistics.median(a["rows_per_s"] / b["rows_per_s"] for a, b in pairs)

    rates = {name: statistics.median(one["rows_per_s"] for one in found) for name, found in kinds.items()}
    loading = {name.removeprefix("end_to_end_"): of for name, of in kinds.items() if "end_to_end" in name}
    found = {
        "rows_per_s": rates,
        "one_worker_over_plain_pytorch": ratio("end_to_end_1", "plain_1"),
        "loader_share_of_step": {
            workers: statistics.median(one["loader_share"] for one in of) for workers, of in loading.items()
        },
    }
    if "2" in loading:
        found["two_workers_over_one"] = ratio("end_to_end_2", "end_to_end_1")
        found["two_workers_over_one_steps_only"] = ratio("step_2", "step_1")
    return found


def table(result: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [f"rows per second, median, batch {result['batch_rows']}, {result['date']}, {result['hardware']}"]
    if machine := result["machine_two_over_one"]:
        lines.append(
            f"the machine itself, two processes over one: matrix products {machine['flops']:.2f}, "
            f"lookups {machine['gather']:.2f}"
        )
    for tower, found in result["towers"].items():
        lines.append(f"\n{tower} tower")
        lines += [f"  {name:>14}  {rate:>10,.0f}" for name, rate in found["rows_per_s"].items()]
        share = max(found["loader_share_of_step"].values())
        if gain := found.get("two_workers_over_one"):
            lines.append(
                f"  two workers over one: {gain:.2f} (required {REQUIRED[tower]}), "
                f"steps only {found['two_workers_over_one_steps_only']:.2f}"
            )
        lines += [
            f"  loading: {share:.1%} of a step (required < {LOADER_SHARE_AT_MOST:.0%})",
            f"  one worker over plain PyTorch: {found['one_worker_over_plain_pytorch']:.2f}",
            f"  one worker, of the machine's own gather bandwidth and sgemm rate: {found['limit']:.0%} "
            f"(required {LIMIT_AT_LEAST:.0%})",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(reported(main, sys.argv[1:]))
