"""Training speed of every model beside plain PyTorch, torch-rechub and deepctr-torch: `bench_train --models`.

Each side is a process (`jobs.bench_sides`), the libraries in environments of their own, on the same made-up
rows: 10 ids, 8 floats, item and category of 20 past events on average and at most 50. All settings run once
a repeat, one after the other, so that what else the machine does hits all alike; a ratio is the median of
the repeats' own. "shipped" is a library's trainer, loader and defaults, beside ours fed from Arrow columns;
"matched" its model in a bare loop on tensors in memory, beside our steps on batches in memory.
"""

import argparse
import datetime as dt
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from jobs.bench_sides.rows import made_up
from recsys_dist.config import nearest
from recsys_dist.errors import ConfigError
from recsys_dist.models.protocol import model_names

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = {"deepctr": "deepctr-torch", "rechub": "torch-rechub"}  # side -> what is installed for it
OURS, PLAIN = "ours", "plain"
OVER = {"shipped": ("fed", 3.0), "matched": ("step", 1.2)}  # setting: ours beside it, times that is required
AT_MOST = {("din", "mlp"): 2.0, ("dien", "din"): 6.0}  # of the other's step time

Key = tuple[str, str, str]  # model, side, setting
Rates = dict[Key, list[float]]  # rows per second, one a repeat


def chosen(models: str) -> list[str]:
    """Names from `all` or a list with commas; ConfigError for one that does not exist."""
    known = [name for name in model_names(counted=False) if name != "youtubednn_ranking"]  # the MLP's tower
    wanted = known if models == "all" else models.split(",")
    for name in wanted:
        if name not in known:
            raise ConfigError(f"--models: {name!r} is not measured{nearest(name, known)}")
    return wanted


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """All figures of the models that `args` names."""
    models = chosen(args.models)
    pythons = {OURS: sys.executable, PLAIN: sys.executable}
    pythons |= {side: environment(library, Path(args.environments)) for side, library in LIBRARIES.items()}
    with tempfile.TemporaryDirectory(prefix="bench-models-") as folder, ExitStack() as stack:
        rows = Path(folder) / "rows.npz"
        np.savez(rows, **made_up(args.steps * args.batch_rows))  # type: ignore[arg-type]
        sides = [
            stack.enter_context(side(name, python, rows, args.batch_rows, args.threads))
            for name, python in pythons.items()
        ]
        rates: Rates = {}
        for group in groups(models):
            rates |= measured(sides, group, args.repeats)
    return {
        "hardware": {"cpu": platform.processor() or platform.machine(), "cpus": os.cpu_count()},
        "date": dt.date.today().isoformat(),
        "batch_rows": args.batch_rows,
        "threads": args.threads,
        **figures(rates),
    }


def groups(models: list[str]) -> Iterator[list[str]]:
    """Models of which a ratio is asked for together, so that they run beside each other; others alone."""
    together = [name for name in models if any(name in pair for pair in AT_MOST)]
    yield from ([name] for name in models if name not in together)
    if together:
        yield together


def environment(library: str, folder: Path) -> str:
    """The Python of a virtual environment with exactly the pinned library, made where there is none yet."""
    pins = [ROOT / "requirements" / name for name in ("torch-cpu.txt", f"bench/{library}.txt")]
    home, wanted = (folder / library).absolute(), "\n".join(pin.read_text() for pin in pins)
    python, stamp = home / "bin" / "python", home / "installed.txt"
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"installing {library} into {home} (once, about two minutes)", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", home], check=True)
        listed = [word for pin in pins for word in ("--requirement", str(pin))]
        done = subprocess.run([python, "-m", "pip", "install", "-q", *listed], check=False)
        if done.returncode != 0:
            raise ConfigError(f"pip could not install {library} into {home}; what it says stands above")
        stamp.write_text(wanted)
    return str(python)


class Side:
    """A process that measures as it is told on stdin, with `environ` added to its own, and logs to `log`."""

    def __init__(self, name: str, command: list[str], log: Path, environ: Mapping[str, str]) -> None:
        self.name, self.log = name, log
        with self.log.open("w") as stream:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONWARNINGS": "ignore", **environ},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                text=True,
            )

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def tell(self, *words: str) -> None:
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)

    def answer(self) -> Any:
        """To the oldest words unanswered; RuntimeError, with the end of what it printed, where it fails."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} failed:\n{self.log.read_text()[-2000:]}")
        return json.loads(line)

    def ask(self, *words: str) -> Any:
        self.tell(*words)
        return self.answer()


def side(name: str, python: str, rows: Path, batch_rows: int, threads: int) -> Side:
    """The process of one side; see jobs.bench_sides."""
    command = [python, "-m", "jobs.bench_sides", name, str(rows), str(batch_rows), str(threads)]
    return Side(name, command, rows.with_name(f"{name}.log"), {"OMP_NUM_THREADS": str(threads)})


def measured(sides: list[Side], models: list[str], repeats: int) -> Rates:
    """Every setting of these models on every side, `repeats` times after one that warms up."""
    runs = [(model, side, setting) for side in sides for model, setting in side.ask("build", *models)]
    runs.sort(key=lambda run: models.index(run[0]))
    rates: Rates = {}
    for _ in range(repeats + 1):
        for model, side, setting in runs:
            rows, seconds = side.ask("run", model, setting)
            rates.setdefault((model, side.name, setting), []).append(rows / seconds)
    return {key: found[1:] for key, found in rates.items()}


def figures(rates: Rates) -> dict[str, Any]:
    """Medians, ours over each library's with what is required, and the step times that are asked for."""
    beside = []
    for (model, side, setting), theirs in rates.items():
        if side != OURS:
            ours, required = OVER[setting]
            ratio = median_ratio(rates[model, OURS, ours], theirs)
            needed = None if side == PLAIN else required
            beside.append(
                {"model": model, "side": side, "setting": setting, "ratio": ratio, "required": needed}
            )
    steps = {
        model: rate for (model, side, setting), rate in rates.items() if (side, setting) == (OURS, "step")
    }
    return {
        "rows_per_s": {" ".join(key): statistics.median(found) for key, found in rates.items()},
        "ours_over": beside,
        "step_times": [
            {"model": one, "of": other, "ratio": median_ratio(steps[other], steps[one]), "at_most": most}
            for (one, other), most in AT_MOST.items()
            if one in steps and other in steps
        ],
        "repeats": {" ".join(key): found for key, found in rates.items()},
    }


def median_ratio(over: list[float], under: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def table(result: dict[str, Any]) -> str:
    """The figures for people: a line a model; where a ratio is short of what is required, an asterisk."""
    head = [
        "model",
        "ours",
        "ours, fed",
        "plain",
        *(f"{side} {s}" for side in LIBRARIES.values() for s in OVER),
    ]
    lines = [head]
    rates, beside = (
        result["rows_per_s"],
        {(b["model"], b["side"], b["setting"]): b for b in result["ours_over"]},
    )
    for model in dict.fromkeys(key.split()[0] for key in rates):
        line = [model, *(f"{rates[f'{model} {OURS} {setting}']:,.0f}" for setting in ("step", "fed"))]
        for side, setting in [
            (PLAIN, "matched"),
            *((side, setting) for side in LIBRARIES for setting in OVER),
        ]:
            line.append(_cell(rates.get(f"{model} {side} {setting}"), beside.get((model, side, setting))))
        lines.append(line)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines
    ]
    needed = ", ".join(f"{setting} {required}" for setting, (_, required) in OVER.items())
    return "\n".join(
        [
            f"rows per second, median, batch {result['batch_rows']}, {result['threads']} threads a process, "
            f"{result['date']}, {result['hardware']}; in brackets ours over theirs, required: {needed}",
            *aligned,
            *(
                f"a step of {each['model']} takes {each['ratio']:.2f} of {each['of']}'s "
                f"(required ≤ {each['at_most']:.0f})"
                for each in result["step_times"]
            ),
        ]
    )


def _cell(rate: float | None, beside: dict[str, Any] | None) -> str:
    if rate is None or beside is None:
        return "-"
    short = beside["required"] is not None and beside["ratio"] < beside["required"]
    return f"{rate:,.0f} ({beside['ratio']:.2f}{'*' if short else ''})"
