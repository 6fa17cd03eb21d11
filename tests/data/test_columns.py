"""Lenient reading of raw columns: exact where a value parses, marked where not, whatever the type."""

import datetime as dt

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_dist.data.columns import Parsed, days, flags, flat, instants, numbers, texts
from recsys_dist.errors import SourceError
from recsys_dist.serve.api import text_of

US = 1_650_812_741_436_123  # 2022-04-24T15:05:41.436123Z


def told(parsed: Parsed) -> list[object]:
    """Each value, "missing" or "bad"."""
    marks = zip(parsed.values.tolist(), parsed.missing, parsed.bad, strict=True)
    return ["missing" if missing else "bad" if bad else value for value, missing, bad in marks]


def test_numbers_of_every_type() -> None:
    text = ["1", " 2.5 ", "-3e2", "+4", "", None, "NA", "NaN", "null", "0x1", "1,5", "1_0", "abc"]
    expected = [1.0, 2.5, -300.0, 4.0, *["missing"] * 5, *["bad"] * 4]
    assert told(numbers(pa.array(text))) == expected
    assert told(numbers(pa.array([1, None, -3]))) == [1.0, "missing", -3.0]
    assert told(numbers(pa.array([1.5, float("nan"), float("inf")]))) == [1.5, "missing", float("inf")]
    assert told(numbers(pa.array([True, False, None]))) == [1.0, 0.0, "missing"]
    assert told(numbers(pa.nulls(2))) == ["missing", "missing"]
    assert told(numbers(pa.array([dt.date(2024, 1, 1), None]))) == ["bad", "missing"]


def test_flags_take_zero_one_and_their_words() -> None:
    text = ["0", "1", "1.0", "True", "false", "2", "yes", "", None]
    assert told(flags(pa.array(text))) == [False, True, True, True, False, "bad", "bad", "missing", "missing"]
    assert told(flags(pa.array([0, 1, 2, -1, None]))) == [False, True, "bad", "bad", "missing"]
    assert told(flags(pa.array([0.0, 1.0, 0.5]))) == [False, True, "bad"]


@pytest.mark.parametrize(("unit", "factor"), [("s", 1e-6), ("ms", 1e-3), ("us", 1), ("ns", 1_000)])
def test_one_instant_in_all_units(unit: str, factor: float) -> None:
    count = int(US * factor)
    expected = {"s": US - US % 1_000_000, "ms": US - US % 1_000, "us": US, "ns": US}[unit]
    for array in (pa.array([count, None]), pa.array([str(count), ""]), pa.array([str(count), "x"])):
        assert told(instants(array, unit))[0] == expected
    stamp = pa.array([count, None]).cast(pa.timestamp(unit, "Asia/Shanghai"))
    assert told(instants(stamp, "iso")) == [expected, "missing"]


def test_fractions_and_extremes_of_time() -> None:
    assert told(instants(pa.array([1650812741.436123, None]), "s")) == [US, "missing"]
    assert told(instants(pa.array(["1650812741.5", "x", None]), "s")) == [1650812741500000, "bad", "missing"]
    assert told(instants(pa.array([-1]), "ns")) == [-1]  # floored, not rounded up to the epoch
    huge = instants(pa.array([2**62, -(2**62)]), "s").values
    assert huge[0] > 10**18 and huge[1] < -(10**18)
    assert told(instants(pa.array(["9" * 30]), "ms"))[0] > 10**18


def test_iso_text_with_and_without_zone() -> None:
    text = [
        "2022-04-24T15:05:41.436123Z",
        "2022-04-24 23:05:41.436123+08:00",
        "2022-04-24 23:05:41.436123 +0800",
        "2022-04-24 15:05:41.4361239",
        "2022-02-30",
        "1650812741",
        "",
    ]
    assert told(instants(pa.array(text), "iso")) == [US] * 4 + ["bad", "bad", "missing"]
    assert told(instants(pa.array(["2022-04-24"]), "iso")) == [US - US % 86_400_000_000]
    assert told(instants(pa.array([7]), "iso")) == ["bad"]


def test_days_in_all_spellings() -> None:
    day = (dt.date(2022, 4, 25) - dt.date(1970, 1, 1)).days
    text = ["20220425", "2022-04-25", " 20220425", "2022-02-30", "25.4.2022", "", None]
    assert told(days(pa.array(text))) == [day] * 3 + ["bad", "bad", "missing", "missing"]
    assert told(days(pa.array([20220425, None, 7]))) == [day, "missing", "bad"]
    assert told(days(pa.array([dt.date(2022, 4, 25), None]))) == [day, "missing"]
    assert told(days(pa.array([dt.datetime(2022, 4, 25, 23, 59)]))) == [day]


def test_ids_agree_whatever_wrote_them() -> None:
    wide = 2**53 + 1
    assert texts(pa.array([12.0, None, 9155697141.0, float("nan")])).to_pylist() == [
        "12",
        None,
        "9155697141",
        None,
    ]
    assert texts(pa.array([12, None, wide])).to_pylist() == ["12", None, str(wide)]
    assert texts(pa.array(["012", "ü", ""])).to_pylist() == ["012", "ü", ""]
    assert texts(pa.array([1.5, 2.0])).to_pylist() == ["1.5", "2"]
    flags = [True, None, False]
    assert texts(pa.array(flags)).to_pylist() == [text_of(flag) for flag in flags], "as a request's are read"


def test_flat_decodes_and_refuses() -> None:
    coded = pa.chunked_array(
        [pa.array(["a", "b", "a"]).dictionary_encode(), pa.array(["c"]).dictionary_encode()]
    )
    assert flat(coded, "x").to_pylist() == ["a", "b", "a", "c"]
    assert flat(pa.array([b"abc"]), "x").to_pylist() == ["abc"]
    for view, values in ((pa.string_view(), ["abc", None]), (pa.binary_view(), [b"abc", None])):
        found = flat(pa.array(values, view), "x")
        assert found.type == pa.string() and found.to_pylist() == ["abc", None]
    with pytest.raises(SourceError, match="'x' holds run_end_encoded"):
        flat(pc.run_end_encode(pa.array([1, 1])), "x")
    with pytest.raises(SourceError, match="'x' holds list"):
        flat(pa.array([[1]]), "x")
    with pytest.raises(SourceError, match="not UTF-8"):
        flat(pa.array([b"\xff"]), "x")
    for sixteen in (pa.binary(16), pa.uuid()):
        with pytest.raises(SourceError, match=r"'x' holds .*; write it as text"):
            flat(pa.array([b"0123456789abcdef"], sixteen), "x")


def python_number(text: str) -> object:
    if text.strip().lower() in ("", "na", "n/a", "nan", "null", "none"):
        return "missing"
    return float(text) if all(c in "0123456789+-.eE " for c in text) else "bad"


@given(st.lists(st.one_of(st.floats(allow_nan=False).map(repr), st.integers().map(str), st.text(max_size=4))))
def test_numbers_in_text_agree_with_python(values: list[str]) -> None:
    values = [v for v in values if v.strip(" \t") == v.strip() and "\x00" not in v]
    for got, value in zip(told(numbers(pa.array(values, pa.string()))), values, strict=True):
        try:
            expected = python_number(value)
        except ValueError:
            expected = "bad"
        if expected == "bad" and got != "bad":
            expected = float(value)  # inf, and spellings such as `Infinity`
        assert got == expected or np.isclose(got, expected, rtol=1e-15)
