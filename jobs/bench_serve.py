"""Measures serving: against Ray Serve's defaults, against one process without Ray, and under faults.

  python -m jobs.bench_serve --bundle runs/quickstart/bundles/VERSION --json serve.json
  python -m jobs.bench_serve --bundle ... --faults

Two-stage /recommend with 200 candidates; the client runs on the same machine. First as many requests as
each way of serving can take (`--connections` at once), then, for ours, half of that rate on a fixed beat.
With --faults 5,000 requests and more go on while a replica is killed, a new champion is taken, a bad one is
refused and the first is rolled back to: none may fail.
"""

import argparse
import asyncio
import datetime as dt
import gc
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp

from jobs import bench_faults
from jobs.command import reported
from jobs.showcase import service
from recsys_dist.bundle import Bundle
from recsys_dist.data.output import write_text

SERVERS = {
    "ours": [],
    "ray_defaults": ["--ray-defaults", "batch_rows=1", "concurrent_batches=1000"],
    "one_process": ["--no-ray"],
}
BUDGET = "budget_ms=10000"  # saturated, so that every request does the whole work
REQUIRED = {"over_ray_defaults": 5.0, "over_one_process": 0.5, "p99_ms_at_half_rate": 60.0}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench_serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bundle", required=True, help="directory of a bundle")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="of one measurement (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--faults", action="store_true", help="measure failed requests under faults instead")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    args = parse(argv)
    bundle = Bundle.open(args.bundle)
    users = bundle.seen["user_id"].to_pylist()
    gc.freeze()  # or the client itself now and then stops for 300 ms to look at what it loaded
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as scratch:
        if args.faults:
            found = bench_faults.measure(bundle, users, Path(scratch))
            print(bench_faults.table(found))
        else:
            found = measure(args, users, Path(scratch))
            print(table(found))
    hardware = {"cpu": platform.processor() or platform.machine(), "cpus": os.cpu_count()}
    if args.json:
        dated = {"hardware": hardware, "date": dt.date.today().isoformat(), **found}
        write_text(json.dumps(dated, indent=1), Path(args.json))


def measure(args: argparse.Namespace, users: list[str], scratch: Path) -> dict[str, Any]:
    """Requests per second of each way of serving, and the latencies of ours at half of its own."""
    rates: dict[str, list[float]] = {}
    for name, options in SERVERS.items():
        with service(["--bundle", args.bundle, BUDGET, *options], scratch / name) as port:
            asyncio.run(saturate(port, users, args.connections, 3.0))  # warms up
            runs = [
                asyncio.run(saturate(port, users, args.connections, args.seconds))
                for _ in range(args.repeats)
            ]
            rates[name] = [len(run) / args.seconds for run in runs]
            print(f"{name}: {', '.join(f'{rate:.0f}' for rate in rates[name])} requests a second", flush=True)
            if name == "ours":
                half = statistics.median(rates[name]) / 2
                steady = asyncio.run(beat(port, users, half, args.seconds))
    median = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "requests_per_s": median,
        "repeats": rates,
        "over_ray_defaults": median["ours"] / median["ray_defaults"],
        "over_one_process": median["ours"] / median["one_process"],
        "half_rate": half,
        "p50_ms_at_half_rate": quantile(steady, 0.5),
        "p99_ms_at_half_rate": quantile(steady, 0.99),
        "connections": args.connections,
    }


async def saturate(port: int, users: list[str], connections: int, seconds: float) -> list[float]:
    """Latencies, in ms, of as many requests as are answered with so many at once."""
    asked, found = itertools.cycle(users), list[float]()
    end = time.perf_counter() + seconds

    async def client(session: aiohttp.ClientSession) -> None:
        while time.perf_counter() < end:
            found.append(await ask(session, port, next(asked)))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=connections)) as session:
        await asyncio.gather(*(client(session) for _ in range(connections)))
    return found


async def beat(port: int, users: list[str], rate: float, seconds: float) -> list[float]:
    """Latencies, in ms, of requests sent at a fixed rate whether or not the former were answered."""
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        began, tasks = time.perf_counter(), []
        for number, user in enumerate(itertools.islice(itertools.cycle(users), int(rate * seconds))):
            await asyncio.sleep(max(0.0, began + number / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(ask(session, port, user)))
        return await asyncio.gather(*tasks)


async def ask(session: aiohttp.ClientSession, port: int, user: str) -> float:
    """Milliseconds that one whole answer took; AssertionError where it is none."""
    began = time.perf_counter()
    body = {"user_id": user, "k": 10, "candidates": 200}
    async with session.post(f"http://127.0.0.1:{port}/recommend", json=body) as response:
        answer = await response.read()
    assert response.status == 200 and b'"recall_' not in answer.rpartition(b'"degraded"')[2], answer
    return 1000 * (time.perf_counter() - began)


def quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def table(found: dict[str, Any]) -> str:
    return "\n".join(_lines(found))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    repeats, connections = len(found["repeats"]["ours"]), found["connections"]
    yield f"requests per second, median of {repeats} runs, {connections} connections"
    yield from (f"  {name:>14}  {rate:>8,.0f}" for name, rate in found["requests_per_s"].items())
    for key, other in (("over_ray_defaults", "Ray Serve's defaults"), ("over_one_process", "one process")):
        yield f"ours over {other}: {found[key]:.2f} (required {REQUIRED[key]})"
    yield (
        f"at half of that rate ({found['half_rate']:.0f}/s): p50 {found['p50_ms_at_half_rate']:.1f} ms, "
        f"p99 {found['p99_ms_at_half_rate']:.1f} ms (required <= {REQUIRED['p99_ms_at_half_rate']:.0f})"
    )


if __name__ == "__main__":
    sys.exit(reported(main, sys.argv[1:]))
