"""`bench_train --overhead`, `--memory`: what we cost on top of TorchRec, and whether memory grows with rows.

8 tables of 100,000 x 32, an MLP of 256, row-wise Adagrad and Adam, one thread a worker. All kinds run once a
repeat, one after the other, by 1 and by 2 workers, so that what else the machine does hits all alike:

torchrec    jobs.bench_sides.torchrec_alone: processes without Ray or a module of ours, batches in memory
tuned       the same with our malloc settings (see `recsys_dist.cpu`), which its users would have to know of
step        our loop, the same batches in memory
end_to_end  our loop, fed by Ray Data from shards
run         that with what a run samples and tells besides, as in an epoch of a million rows

An overhead is the time of ours over TorchRec's, less 1: the median of the repeats' own, and their quartiles.
CPU time is of the training processes alone, and scatters less than wall time on a machine that others use.
"""

import argparse
import datetime as dt
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import ray

from jobs.bench_models import Side
from jobs.bench_workers import free_port, ids_and_floats, started, write_shards
from recsys_dist import session
from recsys_dist.models.mlp import Config

SCHEMA = ids_and_floats(8, 100_000)
CONFIG = Config(embedding_dim=32, hidden=(256,))
THEIRS = {
    "torchrec": {},
    "tuned": {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)},
}
OURS = ("step", "end_to_end", "run")
OVERHEAD_AT_MOST, GROWTH_AT_MOST = 0.05, 0.1
_TIMES_ROWS = 10

Found = dict[str, float]  # of a group of workers: wall seconds, and CPU seconds of all of them
Repeats = dict[str, list[Found]]  # kind -> one a repeat


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Every kind's repeats, by number of workers, and what they come to."""
    _connect()
    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as folder, ExitStack() as stack:
        files = write_shards(Path(folder), args.steps * args.batch_rows, args.batch_rows * 8, SCHEMA)
        kinds = {world: _kinds(world, files, args, Path(folder), stack) for world in (1, 2)}
        runs: dict[int, Repeats] = {world: {kind: [] for kind in kinds[world]} for world in kinds}
        for _ in range(args.repeats + 1):
            for world, measures in kinds.items():
                for kind, measure in measures.items():
                    runs[world][kind].append(measure())
    rows = args.steps * args.batch_rows
    kept = {world: {kind: found[1:] for kind, found in each.items()} for world, each in runs.items()}
    return {
        **_where(args),
        "workers": {world: figures(repeats, rows) | {"repeats": repeats} for world, repeats in kept.items()},
    }


def _connect() -> None:
    """Ray's workers as nice as everyone else: by default they yield to what else the machine does."""
    os.environ.setdefault("RAY_worker_niceness", "0")
    session.connect()


def _kinds(
    world: int, files: list[tuple[str, int]], args: argparse.Namespace, folder: Path, stack: ExitStack
) -> dict[str, Callable[[], Found]]:
    """How each kind is measured once, by processes that are ready for it."""
    group = started(world, args.batch_rows, files, SCHEMA, args.steps)
    ray.get([worker.build.remote(CONFIG) for worker in group])
    batches = [folder / f"batches-{world}-{rank}.pt" for rank in range(world)]
    ray.get([worker.keep.remote(file, CONFIG) for worker, file in zip(group, batches, strict=True)])

    def ours(kind: str) -> Found:
        found = ray.get([worker.measure.remote(kind) for worker in group])
        return _combined([(one["seconds"], one["cpu_s"]) for one in found])

    def theirs(sides: list[Side]) -> Found:
        for side in sides:
            side.tell("train")
        return _combined([side.answer() for side in sides])

    kinds: dict[str, Callable[[], Found]] = {}
    for kind, environ in THEIRS.items():
        port, sides = free_port(), []
        for rank, file in enumerate(batches):
            words = map(str, (rank, world, port, args.steps, file))
            command = [sys.executable, "-m", "jobs.bench_sides.torchrec_alone", *words]
            log = folder / f"{kind}-{world}-{rank}.log"
            sides.append(stack.enter_context(Side(kind, command, log, {**environ, "OMP_NUM_THREADS": "1"})))
        kinds[kind] = lambda sides=sides: theirs(sides)  # type: ignore[misc]
    return kinds | {kind: lambda kind=kind: ours(kind) for kind in OURS}


def _combined(found: list[tuple[float, float]]) -> Found:
    """The slowest worker sets the time."""
    return {"seconds": max(wall for wall, _ in found), "cpu_s": sum(cpu for _, cpu in found)}


def figures(repeats: Repeats, rows: int) -> dict[str, Any]:
    """Of runs over so many rows: medians, and each of our kinds beside each of theirs."""
    return {
        "rows_per_s": {k: statistics.median(rows / one["seconds"] for one in f) for k, f in repeats.items()},
        "cpu_us_per_row": {
            kind: statistics.median(one["cpu_s"] / rows * 1e6 for one in found)
            for kind, found in repeats.items()
        },
        "overhead": {
            f"{ours} over {theirs}, {time}": spread(
                [a[time] / b[time] - 1 for a, b in zip(repeats[ours], repeats[theirs], strict=True)]
            )
            for ours in OURS
            for theirs in THEIRS
            for time in ("seconds", "cpu_s")
        },
    }


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles([*values, *values[: len(values) == 1]], method="inclusive")
    return {"median": middle, "low": low, "high": high}


def table(result: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [_head(result)]
    for world, found in result["workers"].items():
        lines.append(
            f"\n{world} worker(s)     rows/s  CPU us/row"
            + "".join(f"{f'{time} over {t}':>26}" for time in ("wall", "CPU") for t in THEIRS)
        )
        for kind, rate in found["rows_per_s"].items():
            line = f"  {kind:>10}  {rate:>9,.0f}  {found['cpu_us_per_row'][kind]:>10.2f}"
            for time in ("seconds", "cpu_s"):
                each = [found["overhead"].get(f"{kind} over {theirs}, {time}") for theirs in THEIRS]
                line += "".join(f"{_percent(one):>26}" if one else "" for one in each)
            lines.append(line)
    return "\n".join([*lines, f"overhead: median (quartiles); required: at most {OVERHEAD_AT_MOST:.0%}"])


def _percent(of: dict[str, float]) -> str:
    return f"{of['median']:+.1%} ({of['low']:+.1%}..{of['high']:+.1%})"


def memory(args: argparse.Namespace) -> dict[str, Any]:
    """Peak memory of a fresh worker that trains end to end on `args.rows`, and of one on ten times."""
    _connect()
    shard_rows = args.batch_rows * 8
    few = -(-args.rows // shard_rows)
    with tempfile.TemporaryDirectory(prefix="bench-memory-") as folder:
        files = write_shards(Path(folder), few * shard_rows * _TIMES_ROWS, shard_rows, SCHEMA)
        runs: dict[str, list[dict[str, float]]] = {"few": [], "many": []}
        for _ in range(args.repeats):
            for name, some in (("few", files[:few]), ("many", files)):
                [worker] = started(1, args.batch_rows, some, SCHEMA, 0)
                ray.get(worker.build.remote(CONFIG))
                told = ray.get(worker.measure.remote("run"))
                runs[name].append({**told, **ray.get(worker.memory_bytes.remote())})
                ray.kill(worker)
    peaks = {name: statistics.median(one["peak"] for one in found) for name, found in runs.items()}
    return {**_where(args), "growth": peaks["many"] / peaks["few"] - 1, "repeats": runs}


def memory_table(result: dict[str, Any]) -> str:
    """The figures for people."""
    lines = [
        _head(result),
        "      rows  seconds   peak MB, of which at the end:   its own   shared with Ray's store",
    ]
    for one in (one for found in result["repeats"].values() for one in found):
        peak, own, shared = (one[name] / 1e6 for name in ("peak", "own", "shared"))
        lines.append(
            f"{one['rows']:>10,}  {one['seconds']:>7.1f}  {peak:>8,.0f}  {own:>29,.0f}  {shared:>24,.0f}"
        )
    grown = f"peak memory at {_TIMES_ROWS} times the rows: {result['growth']:+.1%}"
    return "\n".join([*lines, f"{grown} (required: less than {GROWTH_AT_MOST:.0%})"])


def _where(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "hardware": {"cpu": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
        "load": os.getloadavg()[0],
        "date": dt.date.today().isoformat(),
        "batch_rows": args.batch_rows,
    }


def _head(result: dict[str, Any]) -> str:
    of = f"batch {result['batch_rows']}, {result['date']}, {result['hardware']}"
    return f"8 tables of 100,000 x 32, MLP 256, {of}, load {result['load']:.1f}"
