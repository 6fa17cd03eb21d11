"""Who may write into a run's directory, and where it keeps its checkpoints: its newest group of workers.

Workers outlive a killed driver, or a frozen node wakes up, for seconds in which the run may already go on
elsewhere. Every start of a run takes it over, first the driver, then each group of workers that it starts;
whoever held it before finds out before it writes. Two machines that share a store but no disk meet there.
"""

import uuid
from pathlib import Path

from recsys_dist.errors import StoreError
from recsys_dist.train import storage
from recsys_dist.train.storage import AnyPath

FENCE = "held_by"  # file of both places: start/group


def take_over(run: Path, checkpoints: str | None) -> str:
    """Begin a new start of the run; returns its name, which its workers are to be given."""
    start = uuid.uuid4().hex
    for file in _files(run, checkpoints):
        with storage.writing(file):
            storage.put(start, file)
    return start


def is_of(run: Path, start: str) -> bool:
    """Whether no newer start has taken the run's directory over."""
    return _read(run / FENCE).partition("/")[0] == start


class Fence:
    """The hold of one group of workers on its run. Rank 0 has it; the others ask rank 0."""

    def __init__(self, run: Path, checkpoints: str | None, start: str) -> None:
        self._files = _files(run, checkpoints)
        self._start = start
        self._group = f"{start}/{uuid.uuid4().hex}"

    def take(self) -> bool:
        """Take the run over from groups before this one; False where a newer start has it."""
        if any(_read(file).partition("/")[0] != self._start for file in self._files):
            return False
        for file in self._files:
            with storage.writing(file):
                storage.put(self._group, file)
        return True

    def holds(self) -> bool:
        """Whether nobody has taken the run over since, as far as a store tells."""
        try:
            return all(_read(file) == self._group for file in self._files)
        except StoreError:
            return True  # it does not take what would be written either, and that is told

    def holds_here(self) -> bool:
        """The same of the run's directory alone: for what is written there often, while training waits."""
        return _read(self._files[0]) == self._group


def _files(run: Path, checkpoints: str | None) -> list[AnyPath]:
    return [place / FENCE for place in dict.fromkeys((run, storage.below(checkpoints, run)))]


def _read(file: AnyPath) -> str:
    with storage.reading(file):
        return str(file.read_text(encoding="utf-8"))
