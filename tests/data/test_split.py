"""Days of a log → training, validation and test."""

import datetime as dt

import pyarrow as pa
import pytest

from recsys_dist.data.split import Split, check_split, choose_split, choose_valid
from recsys_dist.errors import ConfigError, DataError


def day(number: int) -> dt.date:
    return dt.date(2024, 5, number)


SPLIT = Split(valid_from=day(8), test_from=day(9))


def test_days_are_assigned_by_their_boundaries() -> None:
    dates = [day(7), day(8), day(9), day(31), dt.date(1990, 1, 1)]
    assert SPLIT.assign(pa.array(dates)).tolist() == [0, 1, 2, 2, 0]
    assert SPLIT.assign(pa.chunked_array([dates[:1], dates[1:2]])).tolist() == [0, 1]
    assert SPLIT.assign(pa.array([], pa.date32())).tolist() == []


@pytest.mark.parametrize(("days", "test_days"), [(3, 1), (10, 2), (20, 3), (31, 5)])
def test_the_last_days_are_held_out(days: int, test_days: int) -> None:
    dates = [day(number) for number in range(1, days + 1)]
    split = choose_split(dict.fromkeys(reversed(dates), 10))
    assert split == Split(valid_from=dates[-test_days - 1], test_from=dates[-test_days])
    check_split(split, dates)


def test_days_without_events_do_not_count() -> None:
    rows = dict.fromkeys([day(1), day(2), day(20), day(30)], 10)
    assert choose_split(rows) == Split(valid_from=day(20), test_from=day(30))


@pytest.mark.parametrize(
    ("rows", "valid_from"),
    [
        ((1000, 1000, 20, 500), 3),  # 20 of 2,000 is 1 %
        ((1000, 1000, 19, 500), 2),
        ((2000, 7, 6, 7, 500), 2),  # 7, then 13 of more than 2,000, then 20 of 2,000
        ((2000, 0, 6, 7, 500), 2),  # never enough: the first day stays for training
        ((5, 500), 1),  # leaves no training day, which check_split says
    ],
)
def test_validation_begins_early_enough_to_hold_a_hundredth(rows: tuple[int, ...], valid_from: int) -> None:
    by_day = {day(number): count for number, count in enumerate(rows, 1)}
    assert choose_valid(by_day, test_from=day(len(rows))) == day(valid_from)


@pytest.mark.parametrize("days", [0, 1, 2])
def test_a_log_too_short_to_split_is_refused(days: int) -> None:
    with pytest.raises(DataError, match=rf"covers {days} day\(s\).*at least 3"):
        choose_split({day(number + 1): 10 for number in range(days)})


def test_boundaries_out_of_order_are_refused() -> None:
    with pytest.raises(ConfigError, match="valid_from 2024-05-09 must lie before test_from 2024-05-09"):
        Split.parse({"valid_from": "2024-05-09", "test_from": "2024-05-09"})


@pytest.mark.parametrize(
    ("dates", "empty"),
    [
        ([day(8), day(9)], "train"),
        ([day(1), day(7), day(9)], "valid"),  # a gap in the log, just there
        ([day(1), day(8)], "test"),
    ],
)
def test_an_empty_part_is_named(dates: list[dt.date], empty: str) -> None:
    with pytest.raises(ConfigError, match=f"leaves {empty} empty"):
        check_split(SPLIT, dates)
