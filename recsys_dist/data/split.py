"""Split by time: training days, one block of validation days, test days. Nothing is split at random."""

import datetime as dt
from collections.abc import Mapping
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import model_validator

from recsys_dist.config import Config
from recsys_dist.errors import ConfigError, DataError

SPLITS = ("train", "valid", "test")
LEAST_VALID_SHARE = 0.01  # of the training rows; fewer tell one epoch from another by chance


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


def choose_split(rows: Mapping[dt.date, int], test_fraction: float = 0.15) -> Split:
    """The last days of a log for test (`test_fraction` of them, at least one), those before for validation.

    `rows` are those of each day. Raises DataError for a log of fewer than three days.
    """
    days = sorted(rows)
    if len(days) < 3:
        found = ", ".join(str(day) for day in days) or "none"
        raise DataError(
            f"the log covers {len(days)} day(s) ({found}); a split by time needs at least 3: training, "
            "validation and test days. Add days, or check the timestamp column and its unit"
        )
    test_days = max(1, round(len(days) * test_fraction))
    return Split(valid_from=choose_valid(rows, days[-test_days]), test_from=days[-test_days])


def choose_valid(rows: Mapping[dt.date, int], test_from: dt.date) -> dt.date:
    """The last day before `test_from`, or as many days earlier as it takes to hold LEAST_VALID_SHARE.

    One day is left for training where there are two before `test_from`; there must be one.
    """
    days = sorted(day for day in rows if day < test_from)
    training, valid = sum(rows[day] for day in days), 0
    chosen = days[-1]
    for chosen in reversed(days[1:]):
        training, valid = training - rows[chosen], valid + rows[chosen]
        if valid >= LEAST_VALID_SHARE * training:
            break
    return chosen


def check_split(split: Split, dates: list[dt.date]) -> None:
    """Raise ConfigError where a part of the split has no day of the log."""
    filled = set(split.assign(pa.array(dates, pa.date32())))
    empty = [name for index, name in enumerate(SPLITS) if index not in filled]
    if empty:
        raise ConfigError(
            f"split valid_from={split.valid_from} test_from={split.test_from} leaves {empty[0]} empty: the "
            f"log has {len(dates)} days from {min(dates)} to {max(dates)}"
        )
