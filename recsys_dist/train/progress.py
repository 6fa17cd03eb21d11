"""What a run has to tell while it trains: a file of JSON lines that rank 0 writes and the driver reads.

A file survives every kill. A restarted run drops the lines of the epochs that it repeats.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from recsys_dist.data.output import naming, write_text
from recsys_dist.train.loop import Totals
from recsys_dist.train.telemetry import TRACE, Telemetry, Trace

PROGRESS = "progress.jsonl"
_POINTS = 50  # of a learning curve, per epoch


def steps_per_point(expected_rows: int, batch_rows: int) -> int:
    """Steps of `batch_rows` that go by at least between two points of a curve over `expected_rows`."""
    return max(1, int(expected_rows / _POINTS / batch_rows))


class Timer:
    """Whether so many seconds have gone by since it last said so; None: never."""

    def __init__(self, every_s: float | None) -> None:
        self._every_s = every_s
        self._since = time.monotonic()

    def due(self) -> bool:
        """Says so once, then the time begins anew."""
        now = time.monotonic()
        if self._every_s is None or now - self._since < self._every_s:
            return False
        self._since = now
        return True


class Progress:
    """What one worker tells of its run: rank 0 alone in files, as long as the run is its; all as metrics.

    held     asked of rank 0 before it writes: whether the run is its
    profile  whether rank 0 traces a few steps
    """

    def __init__(self, run: Path, rank: int, held: Callable[[], bool], profile: bool) -> None:
        self._file = run / PROGRESS
        self._rank, self._held = rank, held
        self._telemetry = Telemetry(run.name, rank)
        self._trace = Trace(run / TRACE, held) if profile and rank == 0 else None

    def _mine(self) -> bool:
        return self._rank == 0 and self._held()

    def resume(self, phase: str, epochs: int, step: int) -> None:
        """Forget what was told of a phase after its first `epochs` epochs and `step` steps."""

        def still_true(line: dict[str, Any]) -> bool:
            return line.get("epoch", 0) <= epochs or line.get("step", step + 1) <= step

        if self._mine() and self._file.exists():
            lines = [line for line, _ in read(self._file)]
            kept = [line for line in lines if line["phase"] != phase or still_true(line)]
            write_text("".join(json.dumps(line) + "\n" for line in kept), self._file)

    def epoch(self, phase: str, of: int, entry: dict[str, Any], before: int) -> None:
        """An epoch is trained, validated and committed; runs that this one goes on from had `before`."""
        self._append({"kind": "epoch", "phase": phase, "epochs": of, "epochs_before": before, **entry})

    def notice(self, phase: str, what: str, details: list[str]) -> None:
        """Something that whoever waits for the run should read."""
        self._append({"kind": "notice", "phase": phase, "what": what, "details": details})

    def curve(
        self, phase: str, epoch: int, of: int, step: int, expected_rows: int, so_far: Totals
    ) -> Callable[[Totals], None]:
        """A listener for `Epoch.on_step` that tells the mean loss since its last point, about 50 times.

        The first point is of the first step: one sees at once that it trains.
        With it goes what the newest sampled step measured, and how ids used the tables at all of them.
        `step` and `expected_rows` are of the whole epoch, which goes on from `so_far`.
        """
        began = time.perf_counter()
        first = replace(so_far)  # as it is now: it goes on counting
        told = first

        def on_step(now: Totals) -> None:
            nonlocal told
            if self._trace is not None:
                self._trace.stepped()
            due = now.passed - told.passed >= expected_rows / _POINTS or now.passed >= expected_rows
            if not due and told is not first:
                return
            weight = now.weight - told.weight
            point = {
                "kind": "curve",
                "phase": phase,
                "epoch": epoch,
                "epochs": of,
                "step": step + now.steps,
                "rows": now.passed,
                "skipped": now.skipped,
                "of_rows": expected_rows,
                "loss": (now.loss_sum - told.loss_sum) / weight if weight else 0.0,
                "rows_per_s": (now.passed - first.passed) / (time.perf_counter() - began),
                "loader_s": now.loader_s,
                "saving_s": now.saving_s,
                "step_ms": now.step_ms,
                "gradients": now.gradients,
                "tables": {
                    table: {"unknown": unknown / ids, "distinct": distinct / ids}
                    for table, (ids, unknown, distinct) in now.tables.items()
                    if ids
                },
            }
            self._append(point)
            self._telemetry.tell(point, now.rows - told.rows)
            told = replace(now)

        return on_step

    def _append(self, line: dict[str, Any]) -> None:
        if self._mine():
            with naming(self._file), self._file.open("a") as stream:
                stream.write("\n" * _ends_torn(self._file) + json.dumps(line) + "\n")


def _ends_torn(file: Path) -> bool:
    """Whether the last line was not written to its end, as on a full disk."""
    with file.open("rb") as stream:
        if not stream.seek(0, os.SEEK_END):
            return False
        stream.seek(-1, os.SEEK_END)
        return stream.read(1) != b"\n"


@dataclass(frozen=True)
class Place:
    """Where a reader of the file has got to: `offset` bytes of the file with this `inode`."""

    inode: int = 0
    offset: int = 0


def read(file: Path, place: Place = Place()) -> Iterator[tuple[dict[str, Any], Place]]:
    """(line, place after it) of each whole line from `place` on; one still being written is left for later.

    A restarted run puts another file, without what it repeats, in its place: that is read from its start.
    """
    if not file.exists():
        return
    with file.open("rb") as stream:
        inode = os.fstat(stream.fileno()).st_ino
        offset = place.offset if place.inode == inode else 0
        stream.seek(offset)
        for line in stream:
            if line.endswith(b"\n"):
                offset += len(line)
                try:
                    found = json.loads(line)
                except json.JSONDecodeError:  # torn, see `_ends_torn`
                    continue
                yield found, Place(inode, offset)
