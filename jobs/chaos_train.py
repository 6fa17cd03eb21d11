"""Kills training at random, goes on with the same command, and counts what was lost.

  python -m jobs.chaos_train --kills 20
  python -m jobs.chaos_train --kills 200 --json chaos.json

`jobs.train` trains a model that remembers its rows (jobs/ledger_model.py) on a Ray cluster of this machine,
an epoch a run. A driver, a worker, or whichever of them while a checkpoint is being written gets SIGKILL;
a killed driver's run goes on with one, two or three workers. Each finished run's ledger must say that every
row was trained exactly once, and no committed checkpoint may be passed over.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
from tqdm import tqdm

from jobs.command import reported
from jobs.ledger_model import trained_once
from recsys_dist import session
from recsys_dist.data.output import write_text
from recsys_dist.data.pipeline import PrepareConfig, prepare
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import TrainError
from recsys_dist.train.checkpoint import MANIFEST
from recsys_dist.train.fence import FENCE
from recsys_dist.train.pretrained import RESULT
from recsys_dist.train.progress import PROGRESS, read

RESTART_P95_AT_MOST_S = 15.0
_WORKERS = (1, 2, 3)
_KINDS = ("driver", "worker", "saving")
_LR = 0.5
_UNDISTURBED_S = 4.0  # a kill comes so long after training went on, at most
_HANGS_S = 180.0
_POLL_S = 0.005


@dataclass
class Tally:
    """What happened so far. `rows` as `trained_once` counts them, over all finished runs."""

    kills: Counter[str] = field(default_factory=Counter)
    restart_s: list[float] = field(default_factory=list)
    checkpoints_lost: int = 0
    runs: int = 0
    rows: Counter[str] = field(default_factory=Counter)


class Run:
    """One run, its driver, and what there is of it on disk."""

    def __init__(self, prepared: Prepared, out: Path, seed: int) -> None:
        self._command = [
            sys.executable,
            "-m",
            "jobs.train",
            "--model",
            "jobs.ledger_model:Model",
            "--out",
            str(out),
        ]
        shards = ",".join(map(str, prepared.shards("ranking/train").rows))
        self._command += [f"data={prepared.path}", f"seed={seed}", f"model.shards=[{shards}]", "epochs=1"]
        self._command += [
            "refit=false",
            "batch_rows=192",
            f"optimizer.deep.lr={_LR}",
            "optimizer.deep.rule=adagrad",
        ]
        self._command += ["checkpoint_every_s=0.5", "max_failures=1000"]
        self._models, self._log = out / "models", out / "driver.log"
        out.mkdir(parents=True, exist_ok=True)
        self.driver: subprocess.Popen[bytes] | None = None

    def start(self, workers: int) -> None:
        with self._log.open("wb") as log:
            self.driver = subprocess.Popen(
                [*self._command, f"num_workers={workers}"], stdout=subprocess.DEVNULL, stderr=log
            )

    @property
    def path(self) -> Path | None:
        return next(self._models.glob("*"), None)

    def group(self) -> tuple[str, int]:
        """The group of workers that has it, and the file of its progress, which every group replaces."""
        held_by, file = "", 0
        with suppress(FileNotFoundError):
            if self.path:
                held_by = (self.path / FENCE).read_text()
                file = (self.path / PROGRESS).stat().st_ino
        return held_by, file

    def told(self) -> list[int]:
        """The steps of its learning curve."""
        if self.path is None:
            return []
        return [line["step"] for line, _ in read(self.path / PROGRESS) if line["kind"] == "curve"]

    def committed(self) -> int:
        """Steps of its newest committed checkpoint."""
        found = [0]
        for manifest in self.path.glob(f"choose/*/{MANIFEST}") if self.path else ():
            with suppress(FileNotFoundError):  # a newer one has replaced it
                found.append(json.loads(manifest.read_text())["step"])
        return max(found)

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        return any(not (p / MANIFEST).exists() for p in self.path.glob("choose/*")) if self.path else False

    def finished(self) -> bool:
        """Whether its driver has ended; TrainError where it failed."""
        assert self.driver is not None
        if self.driver.poll() is None:
            return False
        if self.driver.returncode or self.path is None or not (self.path / RESULT).exists():
            said = self._log.read_text(errors="replace")[-2000:]
            raise TrainError(f"{' '.join(self._command)} ended with {self.driver.returncode}: {said}")
        return True

    def wait_for_training(self, former: tuple[str, int]) -> int:
        """The first step of a group of workers after `former`; 0 where the run is finished instead."""
        deadline, told = time.monotonic() + _HANGS_S, None
        while not self.finished():
            if time.monotonic() > deadline:
                raise TrainError(f"{self.path} hangs: no step in {_HANGS_S:g} s after a kill")
            held_by, file = self.group()
            if told is None and "/" in held_by and held_by != former[0] and file != former[1]:
                told = len(self.told())  # what is left of before: the group goes on from there
            if told is not None and len(self.told()) > told:
                return self.told()[told]
            time.sleep(_POLL_S)
        return 0

    def wait_for_its_end(self) -> None:
        """TrainError where nothing more is told of it for long."""
        told, deadline = -1, 0.0
        while not self.finished():
            if len(self.told()) != told:
                told, deadline = len(self.told()), time.monotonic() + _HANGS_S
            if time.monotonic() > deadline:
                raise TrainError(f"{self.path} hangs: nothing new in {_HANGS_S:g} s")
            time.sleep(0.1)


def main(argv: list[str]) -> None:
    args = parse(argv)
    out = Path(args.out).absolute()
    prepared = prepare(
        PrepareConfig.parse({"source": {"kind": "simulate", "events": args.events}}), out / "data"
    )
    ray.shutdown()
    session.connect(dashboard=True, cpus=max(_WORKERS))
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    tally = Tally()
    draw = random.Random(args.seed)
    with tqdm(total=args.kills, unit="kill", disable=not sys.stderr.isatty()) as bar:
        while sum(tally.kills.values()) < args.kills:
            left = args.kills - sum(tally.kills.values())
            run = Run(prepared, out / f"run-{args.seed}-{tally.runs}", tally.runs)
            for kind in one_run(run, tally, draw, left):
                tally.kills[kind] += 1
                bar.update()
    result = summary(tally)
    print(table(result))
    if args.json:
        write_text(json.dumps(result, indent=1), Path(args.json))
    if not result["kept_all"]:
        raise TrainError("rows or checkpoints were lost, see above; the runs are kept in " + str(out))


def one_run(run: Run, tally: Tally, draw: random.Random, kills: int) -> Iterator[str]:
    """Train it to its end, killing something so often at most; then look at its ledger. Yields each kill."""
    run.start(draw.choice(_WORKERS))
    step = run.wait_for_training(("", 0))
    while step and kills:
        time.sleep(draw.uniform(0, _UNDISTURBED_S))
        kind = draw.choice(_KINDS)
        deadline = time.monotonic() + _UNDISTURBED_S
        while kind == "saving" and not run.saving() and time.monotonic() < deadline and not run.finished():
            time.sleep(_POLL_S / 5)
        if run.finished():
            break
        former, committed = run.group(), run.committed()
        began = time.monotonic()
        if kind == "driver" or (kind == "saving" and draw.random() < 0.5):
            assert run.driver is not None
            run.driver.kill()
            run.driver.wait()
            run.start(draw.choice(_WORKERS))
        elif not kill_a_worker(draw):
            continue  # they are just ending
        kills -= 1
        yield kind
        step = run.wait_for_training(former)
        if step:
            tally.restart_s.append(time.monotonic() - began)
            tally.checkpoints_lost += step <= committed
    run.wait_for_its_end()
    assert run.path is not None
    found = json.loads((run.path / RESULT).read_text())
    tally.rows.update(trained_once(run.path / found["checkpoint"], _LR))
    tally.runs += 1


def kill_a_worker(draw: random.Random) -> bool:
    """SIGKILL to one training worker of the cluster that this process started."""
    mine = psutil.Process().children(recursive=True)
    workers = []
    for process in mine:
        with suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                workers.append(process)
    if not workers:
        return False
    with suppress(psutil.NoSuchProcess):
        draw.choice(workers).kill()
    return True


def summary(tally: Tally) -> dict[str, Any]:
    """The tally, the machine, and whether everything was kept."""
    restarts = np.array(tally.restart_s or [0.0])
    rows = {kind: tally.rows[kind] for kind in ("once", "lost", "repeated")}
    return {
        "machine": f"{os.cpu_count()} CPUs, {platform.processor() or platform.machine()}",
        "kills": {**tally.kills, "all": sum(tally.kills.values())},
        "runs": tally.runs,
        "rows": rows,
        "checkpoints_lost": tally.checkpoints_lost,
        "hangs": 0,  # one would have ended this with an error
        "restart_s": {f"p{at}": round(float(np.percentile(restarts, at)), 1) for at in (50, 95, 100)},
        "kept_all": rows["lost"] == rows["repeated"] == tally.checkpoints_lost == 0,
    }


def table(result: dict[str, Any]) -> str:
    """For people."""
    kills, rows, restart = result["kills"], result["rows"], result["restart_s"]
    driver, worker, saving = (kills.get(kind, 0) for kind in _KINDS)
    verdict = "met" if restart["p95"] <= RESTART_P95_AT_MOST_S else "not met"
    return (
        f"{kills['all']} kills ({driver} of a driver, {worker} of a worker, {saving} of either while saving) "
        f"over {result['runs']} runs\n"
        f"rows trained once {rows['once']:,}, lost {rows['lost']:,}, repeated {rows['repeated']:,}; "
        f"committed checkpoints passed over {result['checkpoints_lost']}; hangs {result['hangs']}\n"
        f"from a kill to the next step: median {restart['p50']} s, p95 {restart['p95']} s "
        f"(at most {RESTART_P95_AT_MOST_S:g} asked: {verdict}), longest {restart['p100']} s"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.chaos_train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--kills", type=int, default=20, help="at least (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of what is killed when (default: %(default)s)")
    parser.add_argument(
        "--events", type=int, default=300_000, help="of the simulated log (default: %(default)s)"
    )
    parser.add_argument(
        "--out", default="runs/chaos", help="directory for data and runs (default: %(default)s)"
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(reported(main, sys.argv[1:]))
