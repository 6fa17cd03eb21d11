"""Measures what checkpoints cost training, how long they stop it and slow it, and how large increments are.

  python -m jobs.bench_checkpoint --json checkpoint.json

One worker trains an MLP over 8 tables of 1,000,000 x 32 with row-wise Adagrad, 1.06 GB of weights and
optimizer state, on made-up batches in memory. Every `--steps` steps `train.saving.Background` saves: it
copies, which stops training, and a thread writes the copy while training goes on.

After the full ones come increments, of the rows that were touched since the last full one; every batch is
new, and row r of a table is looked up with a probability of 1/r or so (Zipf's law).

stall  what the copy stops training for; of a minute, as a run saves by default once a minute
write  from the end of the copy until all files are on disk and older ones gone; and the thread's CPU time
steps  medians of those while nothing is written, and of those meanwhile
lost   stall and what the slower steps of a write come to, of a minute
marking  what remembering touched rows takes of a step
"""

import argparse
import datetime as dt
import itertools
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist

from jobs.bench_workers import ids_and_floats, made_up
from jobs.command import reported
from recsys_dist import cpu
from recsys_dist.batch import Batch
from recsys_dist.data.collate import collate
from recsys_dist.data.output import write_text
from recsys_dist.errors import ConfigError
from recsys_dist.models.mlp import Config, Model
from recsys_dist.models.protocol import Catalogue
from recsys_dist.train.checkpoint import Checkpoint, Manifest, retain
from recsys_dist.train.loop import Epoch, Loss, Workers, idle_batch
from recsys_dist.train.optim import OptimizerConfig
from recsys_dist.train.pieces import local
from recsys_dist.train.placement import ShardingConfig
from recsys_dist.train.saving import Background, watch
from recsys_dist.train.sharding import ShardedModel, shard

_TABLES, _DIM, _HIDDEN = 8, 32, 256
_EVERY_S = 60.0
STALL_AT_MOST = 0.01  # of training time
INCREMENT_AT_MOST = 0.2  # of a full checkpoint's bytes
MARKING_AT_MOST = 0.01  # of a step


def main(argv: list[str]) -> None:
    args = parse(argv)
    with tempfile.TemporaryDirectory(prefix="bench-checkpoint-", dir=args.folder) as folder:
        result = measure(args, Path(folder))
    print(table(result))
    if args.json:
        write_text(json.dumps(result, indent=1), Path(args.json))


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.bench_checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    parser.add_argument("--table-rows", type=int, default=1_000_000, help="of each table")
    parser.add_argument("--batch-rows", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=30, help="between a commit and the next save")
    parser.add_argument("--saves", type=int, default=4, help="full ones; the first warms up")
    parser.add_argument("--increments", type=int, default=4)
    parser.add_argument("--folder", metavar="DIR", help="where checkpoints go for the while (default: /tmp)")
    return parser.parse_args(argv)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Every save's figures, and what they come to."""
    refuse_without_room(_TABLES * args.table_rows * (_DIM + 1) * 4, folder)
    cpu.configure(1)
    dist.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=0, world_size=1)
    try:
        schema = ids_and_floats(_TABLES, args.table_rows)
        cfg = Config(embedding_dim=_DIM, hidden=(_HIDDEN,))
        torch.manual_seed(0)
        loss = Loss(Model(cfg, schema))
        sharded = shard(loss, loss.model.table_groups(), OptimizerConfig(), ShardingConfig(), seed=0)
        manifest = Manifest(
            model=cfg.model_dump(mode="json"),
            data_schema=schema,
            vocabulary_digest="",
            data_digest="",
            seed=0,
            phase="bench",
            epoch=0,
            step=0,
            history=[],
        )
        saving = _Saving(sharded, manifest, folder, args)
        tables = (made_up(schema, args.batch_rows, number) for number in itertools.count())
        saving.train((collate(table, schema) for table in tables), idle_batch(schema, args.batch_rows))
    finally:
        dist.destroy_process_group()
    return {
        "hardware": {"cpu": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
        "load": os.getloadavg()[0],
        "date": dt.date.today().isoformat(),
        **saving.figures(),
    }


def refuse_without_room(size_bytes: int, folder: Path) -> None:
    """ConfigError where memory, of which a write takes as much again twice, or the disk is too small."""
    memory, disk = psutil.virtual_memory().available, shutil.disk_usage(folder).free
    for what, free, needed in (("memory", memory, 4 * size_bytes), (str(folder), disk, 3 * size_bytes)):
        if free < needed:
            raise ConfigError(
                f"{what} has {free / 1e9:.1f} GB free and {needed / 1e9:.1f} are needed; lower --table-rows"
            )


@dataclass
class _Save:
    """A save and the steps before it, since the last commit; times are those of `time.perf_counter`."""

    asked: bool = False
    began: float = 0.0
    copied: float = 0.0
    committed: float = 0.0
    size_bytes: int = 0
    rows_since_full: int = 0
    write_cpu_s: float = 0.0
    steps_before_s: list[float] = field(default_factory=list)
    steps_during_s: list[float] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        stall_s, write_s = self.copied - self.began, self.committed - self.copied
        step_s = statistics.median(self.steps_before_s)
        slower_s = statistics.median(self.steps_during_s or [step_s])
        lost_s = stall_s + write_s * max(0.0, 1 - step_s / slower_s)
        return {
            "stall_s": stall_s,
            "write_s": write_s,
            "write_cpu_s": self.write_cpu_s,
            "step_ms": step_s * 1e3,
            "step_while_writing_ms": slower_s * 1e3,
            "stall_of_a_minute": stall_s / _EVERY_S,
            "lost_of_a_minute": lost_s / _EVERY_S,
            "size_bytes": self.size_bytes,
            "rows_since_full": self.rows_since_full,
        }


class _Saving:
    """Training that saves so many times, each some steps after the one before was committed."""

    def __init__(
        self, sharded: ShardedModel, manifest: Manifest, folder: Path, args: argparse.Namespace
    ) -> None:
        self.sharded, self.manifest, self.folder, self.args = sharded, manifest, folder, args
        self.background = Background(Workers())
        watch(sharded, at_most=0.0)
        self.marking_s: list[float] = []  # of each step
        self._full_at = 0
        for kernel in (kernel for lookup in sharded.lookups() for kernel in lookup._emb_modules):  # type: ignore[union-attr]
            kernel.register_forward_pre_hook(self._began_marking, prepend=True)
            kernel.register_forward_pre_hook(self._marked)
        self.catalogue = Catalogue(torch.zeros(args.table_rows, dtype=torch.int64))
        self.saves = [_Save()]

    def _began_marking(self, *_: Any) -> None:
        self.marking_s.append(-time.perf_counter())

    def _marked(self, *_: Any) -> None:
        self.marking_s[-1] += time.perf_counter()

    def train(self, batches: Iterator[Batch], idle: Batch) -> None:
        model, optimizers = self.sharded.model, self.sharded.optimizers
        Epoch(model, optimizers, idle, Workers(), due=self._due, save=lambda _: self._save()).run(
            self._timed(batches), 0
        )

    def _due(self) -> bool:
        save = self.saves[-1]
        due = not save.asked and len(save.steps_before_s) >= self.args.steps
        save.asked |= due  # only once: it begins two steps later
        return due

    def _save(self) -> None:
        save = self.saves[-1]

        def committed(saved: Checkpoint) -> None:
            retain(self.folder, [saved.path])
            save.size_bytes = sum(file.size_bytes for file in saved.manifest.files.values())
            save.write_cpu_s = time.thread_time() - sum(one.write_cpu_s for one in self.saves)
            save.committed = time.perf_counter()

        assert self.sharded.touched is not None
        if len(self.saves) > self.args.saves:
            self.sharded.touched.at_most = 1.0
        else:
            self._full_at = len(self.marking_s)
        save.rows_since_full = (len(self.marking_s) - self._full_at) * self.args.batch_rows
        save.began = time.perf_counter()
        self.background.save(self.folder, self.sharded, self.catalogue, self.manifest, then=committed)
        save.copied = time.perf_counter()

    def _timed(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Batches until all is saved. Times steps, from one to the next, but those with a save in them."""
        for batch in batches:
            save = self.saves[-1]
            asked, copied = time.perf_counter(), save.copied
            yield batch
            if save.committed:
                self.background.wait()
                if len(self.saves) == self.args.saves + self.args.increments:
                    return
                self.saves.append(_Save())
            elif save.copied == copied:
                steps = save.steps_during_s if copied else save.steps_before_s
                steps.append(time.perf_counter() - asked)

    def figures(self) -> dict[str, Any]:
        """Medians over the full saves but the first, and each save's own."""
        held = [*self.sharded.weights().values(), *self.sharded.accumulators().values()]
        size = sum(tensor.nbytes for value in held for tensor, _ in local(value))
        saves = [save.figures() for save in self.saves]
        full, increments = saves[: self.args.saves], saves[self.args.saves :]
        counted = full[1:] or full
        medians = {name: statistics.median(save[name] for save in counted) for name in saves[0]}
        for one in increments:
            one["of_full"] = one["size_bytes"] / medians["size_bytes"]
        marking_s = statistics.median(self.marking_s)
        rows = round(_EVERY_S * self.args.batch_rows / medians["step_ms"] * 1e3)
        return {
            "table_bytes": size,
            **medians,
            "saves": full,
            "increments": increments,
            "marking_ms": marking_s * 1e3,
            "marking_of_a_step": marking_s * 1e3 / medians["step_ms"],
            "rows_of_a_minute": rows,
            "touched_in_a_minute": touched(self.args.table_rows, rows),
        }


def touched(table_rows: int, draws: int) -> float:
    """Share of a table's rows that so many ids of `made_up` are expected to look up at least once."""
    probability = np.diff(np.log(np.arange(1, table_rows + 1))) / np.log(table_rows)
    return float(-np.expm1(draws * np.log1p(-probability)).mean())


def table(result: dict[str, Any]) -> str:
    """The figures for people: a line a save, and the medians."""
    lines = [
        f"{result['table_bytes'] / 1e9:.2f} GB of weights and optimizer state, {result['date']}, "
        f"{result['hardware']}, load {result['load']:.1f}",
        "           stall s  write s    CPU s  step ms  while writing  stall, of a minute  lost, of a minute",
    ]
    names = ["warm-up", *(f"save {number}" for number in range(1, len(result["saves"]))), "median"]
    for name, one in zip(names, [*result["saves"], result], strict=True):
        lines.append(
            f"  {name:>7}  {one['stall_s']:>7.3f}  {one['write_s']:>7.2f}  {one['write_cpu_s']:>7.2f}  "
            f"{one['step_ms']:>7.1f}  {one['step_while_writing_ms']:>13.1f}  "
            f"{one['stall_of_a_minute']:>18.2%}  {one['lost_of_a_minute']:>17.2%}"
        )
    lines.append("increments: rows trained since the full one, bytes, of a full one's, stall s, write s")
    lines += [
        f"  {one['rows_since_full']:>10,}  {one['size_bytes']:>11,}  {one['of_full']:>6.1%}  "
        f"{one['stall_s']:>6.3f}  {one['write_s']:>5.2f}"
        for one in result["increments"]
    ]
    lines += [
        f"marking touched rows: {result['marking_ms']:.2f} ms, {result['marking_of_a_step']:.2%} of a step",
        f"a minute's {result['rows_of_a_minute']:,} rows would touch {result['touched_in_a_minute']:.0%} of "
        "each table",
        f"required: a stall of less than {STALL_AT_MOST:.0%}, increments of {INCREMENT_AT_MOST:.0%} at most, "
        f"marking below {MARKING_AT_MOST:.0%}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(reported(main, sys.argv[1:]))
