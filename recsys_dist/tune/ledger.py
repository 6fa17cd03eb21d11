"""What a sweep has tried and what comes next, by asynchronous successive halving (arXiv 1810.05934).

Trials start on the lowest rung, a small part of the training rows. Of the results on a rung, the best one in
`keep` go to the next: `next_job` is the paper's get_job. Two things differ. The first trial, the settings
that the sweep started from, goes up all rungs as one of those, so that what is found is never worse. And
promotions are bounded in number too: at no time have more than one in `keep` gone up, however the results
came in, so that the compute of a sweep is known beforehand. Once nothing more can come onto a rung, the
number is rounded up, and is two at least.

The ledger is a file of JSON lines and the whole state of a sweep: a killed one is read back and goes on.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from recsys_dist.tune.space import Told, Values

FIRST = 0  # the trial with the settings that the sweep started from


@dataclass(frozen=True)
class Job:
    """A trial on a rung. A `check` measures what the sweep itself did not: it is no part of its compute."""

    trial: int
    rung: int
    check: bool = False


@dataclass(frozen=True)
class Result:
    """What a job came to. `value` is the metric, None where it failed, for the reason in `error`.

    trained_rows  over all epochs, also those after the best
    history       an entry per epoch, as `trainer.FitResult` has it
    again         its failure was not for its settings: the next start of the sweep tries once more
    """

    job: Job
    value: float | None
    trained_rows: int
    seconds: float
    checkpoint: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    again: bool = False


@dataclass(frozen=True)
class Plan:
    """How many trials go up which ladder: `rungs` are the fractions of the training rows, the last one 1."""

    trials: int
    rungs: tuple[float, ...]
    keep: int
    maximise: bool

    @property
    def last(self) -> int:
        return len(self.rungs) - 1


class Ledger:
    """Trials and results, in memory and in a file that every change is appended to."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.trials: list[Values] = []
        self.results: dict[Job, Result] = {}
        for line in _lines(file):
            if line["kind"] == "trial":
                self.trials.append(line["values"])
            else:
                result = Result(**{**line["result"], "job": Job(**line["result"]["job"])})
                self.results[result.job] = result
        self.results = {job: result for job, result in self.results.items() if not result.again}

    def start(self, values: Values) -> Job:
        """Begin a trial with these settings."""
        self.trials.append(values)
        self._append({"kind": "trial", "values": values})
        return Job(len(self.trials) - 1, 0)

    def finish(self, result: Result) -> None:
        self.results[result.job] = result
        self._append({"kind": "result", "result": asdict(result)})

    def on_rung(self, rung: int) -> dict[int, Result]:
        """Results of a rung by trial, checks left out."""
        return {job.trial: r for job, r in self.results.items() if job.rung == rung and not job.check}

    def ranked(self, rung: int, maximise: bool) -> list[int]:
        """Trials of a rung that did not fail, best first; equal ones in the order of their numbers."""
        values = {trial: r.value for trial, r in self.on_rung(rung).items() if r.value is not None}
        return sorted(values, key=lambda trial: (-values[trial] if maximise else values[trial], trial))

    def told(self, plan: Plan) -> list[Told]:
        """Every trial as the proposer hears of it."""
        told = []
        for trial, values in enumerate(self.trials):
            mine = [r for job, r in self.results.items() if job.trial == trial and not job.check]
            good = max((r for r in mine if r.value is not None), key=lambda r: r.job.rung, default=None)
            rung = good.job.rung if good else 0
            failed = good is None and bool(mine)
            told.append(Told(values, rung, good.value if good else None, rung == plan.last, failed))
        return told

    def _append(self, line: dict[str, Any]) -> None:
        # the leading newline ends a line that a kill left torn
        with self.file.open("a") as stream:
            stream.write("\n" + json.dumps(line) + "\n")


def next_job(ledger: Ledger, plan: Plan, running: set[Job]) -> Job | None:
    """The highest promotion that is due, else an interrupted or a new trial (number `len(ledger.trials)`).

    None where nothing can start now: everything is done if nothing is `running` either.
    """
    for rung in reversed(range(plan.last)):
        best = _to_promote(ledger, plan, running, rung)
        if best is not None:
            return Job(best, rung + 1)
    begun = ledger.on_rung(0)
    waiting = (n for n in range(plan.trials) if n not in begun and Job(n, 0) not in running)
    first = next(waiting, None)
    return None if first is None else Job(first, 0)


def next_check(ledger: Ledger, plan: Plan, running: set[Job]) -> Job | None:
    """A trial that did not get to the last rung and was not yet checked there."""
    done = ledger.on_rung(plan.last)
    jobs = (Job(trial, plan.last, check=True) for trial in range(len(ledger.trials)) if trial not in done)
    return next((job for job in jobs if job not in ledger.results and job not in running), None)


def _to_promote(ledger: Ledger, plan: Plan, running: set[Job], rung: int) -> int | None:
    ranked = ledger.ranked(rung, plan.maximise)
    above = _begun(ledger, running, rung + 1)
    if FIRST in ranked and FIRST not in above:
        return FIRST
    if len(above - {FIRST}) >= _quota(ledger, plan, running, rung):
        return None
    return next((trial for trial in ranked if trial not in above), None)


def _quota(ledger: Ledger, plan: Plan, running: set[Job], rung: int) -> int:
    """How many trials besides the first may have gone up from a rung by now."""
    results = len(ledger.on_rung(rung))
    if _full(ledger, plan, running, rung):
        return max(1, math.ceil(results / plan.keep) - 1)
    return results // plan.keep - 1


def _full(ledger: Ledger, plan: Plan, running: set[Job], rung: int) -> bool:
    """Can nothing more come onto this rung?"""
    if len(ledger.on_rung(rung)) < len(_begun(ledger, running, rung)):
        return False
    if rung == 0:
        return len(ledger.on_rung(0)) >= plan.trials
    good = set(ledger.ranked(rung - 1, plan.maximise))
    due = min(_quota(ledger, plan, running, rung - 1), len(good - {FIRST})) + (FIRST in good)
    return _full(ledger, plan, running, rung - 1) and len(_begun(ledger, running, rung)) >= due


def _begun(ledger: Ledger, running: set[Job], rung: int) -> set[int]:
    """Trials that are, or were, on a rung."""
    return set(ledger.on_rung(rung)) | {job.trial for job in running if job.rung == rung and not job.check}


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """Whole lines of the ledger; one that a kill tore is left out, for its job is done again."""
    if not file.exists():
        return
    for text in file.read_text().splitlines():
        try:
            if text.strip():
                yield json.loads(text)
        except ValueError:
            continue
