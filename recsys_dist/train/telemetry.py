"""What training tells Prometheus, through Ray's metrics endpoint, and the trace of a few of its steps.

All metrics have the labels {run, phase, worker}. Worker 0 tells what is alike on all workers:
recsys_train_rows                     rows trained, by all workers
recsys_train_rows_per_s               of the epoch so far
recsys_train_loss                     mean since the last point of the learning curve
recsys_train_gradient{layer}          L2 norm of a layer's gradient, before clipping
and each worker what is its own:
recsys_train_step_ms{part}            where the time of the newest sampled step went (see `sampling.PARTS`)
recsys_train_loader_s                 waiting for batches in the epoch so far
recsys_train_saving_s                 what checkpoints have stopped training for in the epoch so far
recsys_train_table{table, share}      unknown: ids that are; distinct: rows over ids of a batch
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from ray.util.metrics import Counter, Gauge
from torch.profiler import ProfilerActivity, profile

from recsys_dist.data.output import replacing

TRACE = "profile.json"  # of a run's directory
_BEGINS_AFTER, _ENDS_AFTER = 4, 10  # steps, since training was started


class Telemetry:
    """The metrics of one worker of a run."""

    def __init__(self, run: str, worker: int) -> None:
        common = ("run", "phase", "worker")
        self._tags = {"run": run, "worker": str(worker)}
        self._rows = Counter("recsys_train_rows", "rows trained", common)
        self._alike = [] if worker else ["rows_per_s", "loss"]
        self._single = {
            name: Gauge(f"recsys_train_{name}", text, common)
            for name, text in {
                "rows_per_s": "trained rows a second, of all workers",
                "loss": "mean since the last point",
                "loader_s": "seconds of waiting for batches in this epoch",
                "saving_s": "seconds that checkpoints stopped training for in this epoch",
            }.items()
        }
        self._gradient = Gauge("recsys_train_gradient", "norm of a layer's gradient", (*common, "layer"))
        self._step_ms = Gauge("recsys_train_step_ms", "milliseconds of a step", (*common, "part"))
        self._table = Gauge("recsys_train_table", "how ids use a table", (*common, "table", "share"))

    def tell(self, point: dict[str, Any], new_rows: int) -> None:
        """A point of the learning curve, `new_rows` after the one before it."""
        tags = {**self._tags, "phase": point["phase"]}
        if self._alike:
            if new_rows:  # a counter takes no 0, as where all steps since the last point were left out
                self._rows.inc(new_rows, tags)
            for layer, norm in point["gradients"].items():
                self._gradient.set(norm, {**tags, "layer": layer})
        for name in (*self._alike, "loader_s", "saving_s"):
            self._single[name].set(point[name], tags)
        for part, ms in point["step_ms"].items():
            self._step_ms.set(ms, {**tags, "part": part})
        for table, shares in point["tables"].items():
            for share, value in shares.items():
                self._table.set(value, {**tags, "table": table, "share": share})


def _activities() -> list[ProfilerActivity]:
    on_gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return [ProfilerActivity.CPU, *on_gpu]


class Trace:
    """Has torch.profiler watch this process from the 5th to the 10th step; to be called after each step.

    `file`, as chrome://tracing and ui.perfetto.dev read it, is written after the 10th, where `enabled` then.
    """

    def __init__(self, file: Path, enabled: Callable[[], bool]) -> None:
        self._file, self._enabled = file, enabled
        self._steps = 0

    def stepped(self) -> None:
        self._steps += 1
        if self._steps == _BEGINS_AFTER:
            self._profiler = profile(activities=_activities())
            self._profiler.start()
        if self._steps == _ENDS_AFTER:
            self._profiler.stop()
            if self._enabled():
                with replacing(self._file) as partial:
                    self._profiler.export_chrome_trace(str(partial))
