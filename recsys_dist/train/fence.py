"""Who may write into a run's directory: its newest group of workers.

Workers outlive a killed driver, or a frozen node wakes up, for seconds in which the run may already go on
elsewhere. Every start of a run takes it over, first the driver, then each group of workers that it starts;
whoever held it before finds out before it writes.
"""

import uuid
from pathlib import Path

from recsys_dist.data.output import write_text

FENCE = "held_by"  # file of a run's directory: start/group


def take_over(run: Path) -> str:
    """Begin a new start of the run; returns its name, which its workers are to be given."""
    start = uuid.uuid4().hex
    write_text(start, run / FENCE)
    return start


class Fence:
    """The hold of one group of workers on its run. Rank 0 has it; the others ask rank 0."""

    def __init__(self, run: Path, start: str) -> None:
        self._file = run / FENCE
        self._start = start
        self._group = f"{start}/{uuid.uuid4().hex}"

    def take(self) -> bool:
        """Take the run over from groups before this one; False where a newer start has it."""
        if self._file.read_text().partition("/")[0] != self._start:
            return False
        write_text(self._group, self._file)
        return True

    def holds(self) -> bool:
        """Whether nobody has taken the run over since."""
        return self._file.read_text() == self._group
