"""Split by time: training days, one block of validation days, test days. Nothing is split at random."""

import datetime as dt
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import model_validator

from recsys_dist.config import Config
from recsys_dist.errors import ConfigError, DataError

SPLITS = ("train", "valid", "test")


class Split(Config):
    """First day of validation and of test, by the log's own local `date`; what comes before is training."""

    valid_from: dt.date
    test_from: dt.date

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.valid_from >= self.test_from:
            raise ValueError(f"valid_from {self.valid_from} must lie before test_from {self.test_from}")
        return self

    def assign(self, date: pa.ChunkedArray | pa.Array) -> np.ndarray:
        """[n] int8 index into SPLITS of each event."""
        later = [pc.greater_equal(date, pa.scalar(d, pa.date32())) for d in (self.valid_from, self.test_from)]
        valid, test = (np.asarray(mask).astype(np.int8) for mask in later)
        return valid + test


def choose_split(dates: list[dt.date], test_fraction: float = 0.15) -> Split:
    """The last days of a log for test (`test_fraction` of them, at least one), the day before for validation.

    Raises DataError for a log of fewer than three days.
    """
    days = sorted(set(dates))
    if len(days) < 3:
        found = ", ".join(str(day) for day in days) or "none"
        raise DataError(
            f"the log covers {len(days)} day(s) ({found}); a split by time needs at least 3: training, "
            "validation and test days. Add days, or check the timestamp column and its unit"
        )
    test_days = max(1, round(len(days) * test_fraction))
    return Split(valid_from=days[-test_days - 1], test_from=days[-test_days])


def check_split(split: Split, dates: list[dt.date]) -> None:
    """Raise ConfigError where a part of the split has no day of the log."""
    filled = set(split.assign(pa.array(dates, pa.date32())))
    empty = [name for index, name in enumerate(SPLITS) if index not in filled]
    if empty:
        raise ConfigError(
            f"split valid_from={split.valid_from} test_from={split.test_from} leaves {empty[0]} empty: the "
            f"log has {len(dates)} days from {min(dates)} to {max(dates)}"
        )
