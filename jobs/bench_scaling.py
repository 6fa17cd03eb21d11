"""Scale on paper and by simulation: a cost model fitted here, checked on 1, 2 and 3 workers, then extended.

  python -m jobs.bench_scaling --json scaling.json --write docs/scaling.md

Measures what each worker's machine gives (lookups, matrix products, all-to-all over gloo, loading) while all
workers of its group are at it, so that what they, and others, take from each other is in the rates. What a
model asks is counted (see recsys_dist.train.rehearsal). The prediction is compared with end-to-end training
right after. Then the same model with the rates of data sheets: H100s, a terabyte of tables.
"""

import argparse
import datetime as dt
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from torch.utils.flop_counter import FlopCounterMode

from jobs import scaling_page, scaling_paper
from jobs.bench_workers import BENCH_SCHEMA, combined, made_up, started, write_shards
from jobs.command import reported
from jobs.cost_model import FLOAT_BYTES, Machine, Spread, Table, Work, fitted, limit_s, step_seconds, total_s
from recsys_dist import session
from recsys_dist.data.collate import collate
from recsys_dist.data.output import write_text
from recsys_dist.models import dlrm, wide_deep
from recsys_dist.models.protocol import model_module
from recsys_dist.models.ranking import TowerConfig
from recsys_dist.schema import Schema
from recsys_dist.train.loop import Loss
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.placement import Placed, ShardingConfig, place, tables_of
from recsys_dist.train.rehearsal import Rehearsed, rehearse

WORLDS = (1, 2, 3)
LIMIT_AT_LEAST = scaling_page.LIMIT_AT_LEAST
_FEW_ROWS = 256
MODELS: dict[str, TowerConfig] = {
    "wide_deep 256-128": wide_deep.Config(),
    "wide_deep 1024-512-256": wide_deep.Config(hidden=(1024, 512, 256)),
    "dlrm": dlrm.Config(embedding_dim=32, bottom=(256,), hidden=(512, 256)),
}


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.json and Path(args.json).exists() and args.keep:
        result = json.loads(Path(args.json).read_text())
    else:
        result = measure(args)
        if args.json:
            write_text(json.dumps(result, indent=1), Path(args.json))
    print(scaling_page.measured(result))
    paper = scaling_paper.on_paper(asked_on_paper(), result["loader_rows_per_s"], args.seed)
    print(scaling_page.told(paper))
    if args.write:
        scaling_page.write(Path(args.write), result, paper)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench_scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", metavar="FILE", help="write all measurements there")
    parser.add_argument("--keep", action="store_true", help="take what FILE has, and measure nothing")
    parser.add_argument("--write", metavar="PAGE", help="write the page, and its figures beside it")
    parser.add_argument("--steps", type=int, default=12, help="of one measurement")
    parser.add_argument("--repeats", type=int, default=3, help="of everything, interleaved")
    parser.add_argument("--batch-rows", type=int, default=4096, help="rows of a global batch")
    parser.add_argument("--models", default=",".join(MODELS), help="which of them (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is simulated")
    return parser.parse_args(argv)


def asked_on_paper() -> dict[str, scaling_paper.Asked]:
    """The models whose tables are a terabyte, counted on a few rows of the real code."""
    found = {}
    for name, (cfg, schema) in scaling_paper.models().items():
        work, step, _ = counted(cfg, schema, _FEW_ROWS, ())
        loss = Loss(model_module(cfg.name).Model(cfg, schema))
        tables = [
            Table(table.num_embeddings, step.ids[table.name] / _FEW_ROWS, table.embedding_dim)
            for table in by_name(loss).values()
        ]
        found[name] = scaling_paper.Asked(work, tables)
    return found


def counted(
    cfg: TowerConfig, schema: Schema, rows: int, worlds: tuple[int, ...]
) -> tuple[Work, Rehearsed, dict[int, list[Placed]]]:
    """What a model asks per row, counted on so many made-up ones, and where its tables lie on each world."""

    def built() -> Loss:
        return Loss(model_module(cfg.name).Model(cfg, schema))

    loss = built()
    dense = sum(weight.nbytes for weight in loss.parameters() if not weight.is_meta)
    with FlopCounterMode(display=False) as flops:
        step = rehearse(loss, collate(made_up(schema, rows, 0), schema), workers=1)
    placed, sharding = {}, ShardingConfig(ids=step.ids_per_row)
    for world in worlds:
        model = built()
        placed[world] = place(model, model.model.table_groups(), OptimizerConfig(), sharding, world)
    dims = {name: table.embedding_dim for name, table in by_name(loss).items()}
    work = Work(
        id_bytes=sum(step.ids.values()) * FLOAT_BYTES / rows,
        table_bytes=sum(count * dims[table] for table, count in step.ids.items()) * FLOAT_BYTES / rows,
        vector_bytes=sum(count * dims[table] for table, count in step.vectors.items()) * FLOAT_BYTES / rows,
        flops=flops.get_total_flops() / rows,
        dense_bytes=dense,
    )
    return work, step, placed


def by_name(loss: Loss) -> dict[str, Any]:
    return {table.name: table for table in tables_of(loss).values()}


def spread_of(tables: list[Placed], step: Rehearsed, workers: int) -> Spread:
    """Of whole tables, or of stretches of rows that are looked up alike."""

    def busiest(counts: Any) -> float:
        load = [0.0] * workers
        for table in tables:
            for worker, rows, wide in table.pieces:
                load[worker] += counts[table.name] * wide * rows / table.rows
        return max(load) / statistics.mean(load)

    return Spread(busiest=busiest(step.ids), sent=busiest(step.vectors))


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every model's repeats by number of workers: what was measured, and what was predicted right before."""
    os.environ.setdefault("RAY_worker_niceness", "0")
    session.connect()
    models: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="bench-scaling-") as folder:
        rows = args.steps * args.batch_rows
        files = write_shards(Path(folder), rows, args.batch_rows * 8, BENCH_SCHEMA)
        groups = {world: started(world, args.batch_rows, files) for world in WORLDS}
        for name in args.models.split(","):
            work, step, placed = counted(MODELS[name], BENCH_SCHEMA, args.batch_rows, WORLDS)
            spreads = {world: spread_of(placed[world], step, world) for world in WORLDS}
            for group in groups.values():
                ray.get([worker.build.remote(MODELS[name]) for worker in group])
            runs = [repeat(groups, args.batch_rows) for _ in range(args.repeats + 1)][
                1:
            ]  # the first warms up
            told = predicted(runs, work, spreads, args.batch_rows)
            models[name] = {"work": vars(work), "repeats": told}
    every = [run for found in models.values() for run in found["repeats"]]
    return {
        "hardware": {"cpus": os.cpu_count()},
        "load": os.getloadavg()[0],
        "date": dt.date.today().isoformat(),
        "batch_rows": args.batch_rows,
        "loader_rows_per_s": statistics.median(run["1"]["machine"]["loader"] for run in every),
        "models": models,
    }


def repeat(groups: dict[int, list[Any]], batch_rows: int) -> dict[str, Any]:
    """Workers -> seconds of a step, and the rates before and after that."""
    found: dict[str, Any] = {}
    for world, group in groups.items():
        loading = combined(ray.get([worker.measure.remote("loader") for worker in group]))
        limits = ray.get([worker.limits.remote() for worker in group])
        training = combined(ray.get([worker.measure.remote("end_to_end") for worker in group]))
        limits += ray.get([worker.limits.remote() for worker in group])
        machine = machine_of(limits, loading["rows_per_s"] / world, world)
        found[str(world)] = {"machine": vars(machine), "measured_s": batch_rows / training["rows_per_s"]}
    return found


def predicted(
    runs: list[dict[str, Any]], work: Work, spreads: dict[int, Spread], batch_rows: int
) -> list[dict[str, Any]]:
    """`repeat`s with what the model says of each: `counted_s`, and `predicted_s` with its `phases`.

    What a row costs besides what is counted is arithmetic too, and slow where that is: it is the median of
    what one worker's repeats miss, in products that the machine did in that time.
    """
    alone = [run["1"] for run in runs]
    fits = [fitted(work, Machine(**one["machine"]), batch_rows, one["measured_s"]) for one in alone]
    rest_flops = statistics.median(fit.row_s * fit.flops for fit in fits)
    for run in runs:
        for world, one in run.items():
            machine, spread = Machine(**one["machine"]), spreads[int(world)]
            rest = replace(machine, row_s=rest_flops / machine.flops)
            counts = step_seconds(work, machine, batch_rows, int(world), spread)
            one["phases"] = step_seconds(work, rest, batch_rows, int(world), spread)
            one["counted_s"] = total_s(counts, ahead=False)
            one["predicted_s"] = total_s(one["phases"], ahead=False)
            one["limit"] = limit_s(work, machine, batch_rows / int(world)) / one["measured_s"]
    return runs


def machine_of(limits: list[dict[str, float]], loader: float, workers: int) -> Machine:
    """Of a group of so many on one machine, each of whom was asked equally often: of the slowest of them."""
    own = [limits[worker::workers] for worker in range(workers)]
    latency_s = max(statistics.mean(one.get("latency_s", 0.0) for one in of) for of in own)
    rates = [name for name in limits[0] if name != "latency_s"]
    slowest = {name: min(statistics.harmonic_mean([one[name] for one in of]) for of in own) for name in rates}
    send = slowest.get("send", 1.0)
    return Machine(
        loader=loader,
        gather=slowest["gather"],
        flops=slowest["flops"],
        stream=slowest["stream"],
        near=send,
        far=send,
        group=workers,
        latency_s=latency_s,
    )


if __name__ == "__main__":
    sys.exit(reported(main, sys.argv[1:]))
