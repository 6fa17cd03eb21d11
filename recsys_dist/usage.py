"""What the machine and this process tree use: for the run's system metrics and the report's peak memory."""

import logging
import shutil
import threading
import time
from pathlib import Path
from typing import Self

import psutil

from recsys_dist.outbox import Recorder

log = logging.getLogger(__name__)


class UsageSampler:
    """Records what the machine and this process tree use, every `every_s` seconds, from a thread.

    Without a recorder it only looks for the peak. As a context manager it stops at the end.
    """

    def __init__(
        self, recorder: Recorder | None = None, every_s: float = 10.0, peak_every_s: float = 2.0
    ) -> None:
        self.peak_rss_bytes = process_tree_rss_bytes()
        self._recorder = recorder
        self._every_s = every_s
        self._pause_s = min(peak_every_s, every_s)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="usage", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self.peak_rss_bytes = max(self.peak_rss_bytes, process_tree_rss_bytes())

    def _loop(self) -> None:
        psutil.cpu_percent()  # the first call only starts the measurement
        due, step = time.monotonic() + self._every_s, 0
        while not self._stop.wait(self._pause_s):
            rss_bytes = process_tree_rss_bytes()
            self.peak_rss_bytes = max(self.peak_rss_bytes, rss_bytes)
            if self._recorder is None or time.monotonic() < due:
                continue
            due += self._every_s
            step += 1
            try:
                self._recorder.metrics(system_metrics(self._recorder.directory, rss_bytes), step)
            except OSError as error:
                log.warning("system metrics end here: %s", error)
                return


def system_metrics(directory: Path, rss_bytes: int) -> dict[str, float]:
    """CPU, memory and disk now, under the names of MLflow's own page of system metrics."""
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(directory)
    return {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
        "system/disk_usage_percentage": 100 * disk.used / disk.total,
        "system/disk_available_megabytes": disk.free / 1e6,
        "system/process_tree_rss_megabytes": rss_bytes / 1e6,
    }


def process_tree_rss_bytes() -> int:
    """Resident memory of this process and its descendants, what they share counted once.

    Each one's private pages plus the largest shared part (on Linux; elsewhere shared pages count
    in every process). Ray's object store is shared memory: the plain sum would count it many times.
    """
    private, shared = 0, 0
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            info = process.memory_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue  # it ended between the two calls
        shared_here = getattr(info, "shared", 0)
        private += info.rss - shared_here
        shared = max(shared, shared_here)
    return private + shared
