"""Reads raw Arrow columns of whatever type leniently: a value that does not parse is marked, not raised.

n rows. All functions are columnar, and exact for values that do parse.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.errors import SourceError

TimestampUnit = Literal["s", "ms", "us", "ns", "iso"]

US_PER_DAY = 86_400_000_000
US_PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1, "ns": 1 / 1_000}
# What data tools write for a missing number (pandas, R, SQL dumps); elsewhere these are plain text.
MISSING_WORDS = ("", "na", "n/a", "nan", "null", "none")
ZONE = r":\d{2}(\.\d+)? ?(Z|z|[+-]\d{2}(:?\d{2})?)$"


@dataclass(frozen=True)
class Parsed:
    """A column's values with what is wrong with them; where missing or bad, the value means nothing.

    values   [n] float64, int64 or bool
    missing  [n] bool: null, or a word for it
    bad      [n] bool: present, but does not parse
    """

    values: np.ndarray
    missing: np.ndarray
    bad: np.ndarray


def flat(column: pa.ChunkedArray | pa.Array, name: str) -> pa.Array:
    """One contiguous array; dictionaries decoded, bytes as text. SourceError for types of other values."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    if pa.types.is_string_view(array.type) or pa.types.is_binary_view(array.type):
        array = array.cast(pa.string() if pa.types.is_string_view(array.type) else pa.binary())
    if pa.types.is_nested(array.type) or pa.types.is_run_end_encoded(array.type):
        raise SourceError(f"column {name!r} holds {array.type}; one value a row is needed")
    if isinstance(array, pa.ExtensionArray) or pa.types.is_fixed_size_binary(array.type):  # as a UUID
        raise SourceError(f"column {name!r} holds {array.type}; write it as text")
    if pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type):
        try:
            return array.cast(pa.string())
        except pa.ArrowInvalid as error:
            raise SourceError(f"column {name!r} holds bytes that are not UTF-8: {error}") from None
    return array


def texts(array: pa.Array) -> pa.StringArray:
    """Any flat column as text; whole floats print as integers ("12", not "12.0"), so that ids that
    one tool wrote as integers and another, for the sake of nulls, as floats stay equal. Booleans are
    1 and 0."""
    if pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    if pa.types.is_floating(array.type):
        array = array.cast(pa.float64())
        values = pc.fill_null(array, 0.5).to_numpy(zero_copy_only=False)
        whole = np.isfinite(values) & (np.abs(values) < 2**53) & (values == np.trunc(values))
        integers = pa.array(np.where(whole, values, 0).astype(np.int64)).cast(pa.string())
        present = pc.if_else(pc.is_nan(array), None, array).cast(pa.string())
        return pc.if_else(pa.array(whole), integers, present)
    return array.cast(pa.string())


def numbers(array: pa.Array) -> Parsed:
    """Float64 values of numbers, booleans and text; NaN counts as missing, infinities are values."""
    if is_text(array):
        return _numbers_in_text(array)
    if pa.types.is_temporal(array.type):
        missing = _nulls(array)
        return Parsed(np.zeros(len(array)), missing, ~missing)
    values = pc.fill_null(array.cast(pa.float64(), safe=False), np.nan).to_numpy(zero_copy_only=False)
    return Parsed(values, np.isnan(values), np.zeros(len(array), bool))


def flags(array: pa.Array) -> Parsed:
    """Booleans out of 0/1, true/false (any case) and their text; anything else is bad."""
    if is_text(array):
        lower = pc.utf8_lower(pc.utf8_trim_whitespace(array.cast(pa.string())))
        array = pc.if_else(pc.equal(lower, "true"), "1", pc.if_else(pc.equal(lower, "false"), "0", lower))
    parsed = numbers(array)
    wrong = ~parsed.missing & ~np.isin(parsed.values, (0.0, 1.0))
    return Parsed(parsed.values == 1.0, parsed.missing, parsed.bad | wrong)


def instants(array: pa.Array, unit: TimestampUnit) -> Parsed:
    """Microseconds since 1970 UTC, int64, finer units floored, saturated at the range of int64.

    Numbers count `unit`s; text is numbers too, or with `unit="iso"` ISO 8601. A timestamp type
    states its own unit. Where no zone is given, the time is taken as UTC.
    """
    if pa.types.is_timestamp(array.type):
        return _scaled(array.cast(pa.int64()), array.type.unit)
    if pa.types.is_date(array.type):
        return _scaled(array.cast(pa.timestamp("ms")).cast(pa.int64()), "ms")
    if is_text(array):
        return _instants_in_iso_text(array) if unit == "iso" else _instants_in_text(array, unit)
    if unit == "iso":
        missing = _nulls(array)
        return Parsed(np.zeros(len(array), np.int64), missing, ~missing)
    return _scaled(array, unit)


def days(array: pa.Array) -> Parsed:
    """Days since 1970, int64, of dates, timestamps, and 20220425 or 2022-04-25 as number or text."""
    if pa.types.is_temporal(array.type):
        parsed = instants(array, "us")
        return Parsed(parsed.values // US_PER_DAY, parsed.missing, parsed.bad)
    text = pc.utf8_trim_whitespace(texts(array))
    dashed = pc.replace_substring_regex(text, r"^(\d{4})(\d{2})(\d{2})$", r"\1-\2-\3")
    dashed = pc.if_else(pc.match_substring_regex(dashed, r"^\d{4}-\d{2}-\d{2}$"), dashed, None)
    missing = _nulls(text) | _equal(text, "")
    day = _cast_or_null(dashed, pa.date32())
    values = pc.fill_null(day.cast(pa.int32()), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    return Parsed(values, missing, ~missing & _nulls(day))


def is_text(array: pa.Array) -> bool:
    return pa.types.is_string(array.type) or pa.types.is_large_string(array.type)


def _nulls(array: pa.Array) -> np.ndarray:
    return pc.is_null(array).to_numpy(zero_copy_only=False)


def _equal(array: pa.Array, text: str) -> np.ndarray:
    return pc.fill_null(pc.equal(array, text), False).to_numpy(zero_copy_only=False)


def _numbers_in_text(array: pa.Array) -> Parsed:
    try:  # the common case: every value parses
        values = pc.fill_null(array.cast(pa.float64()), np.nan).to_numpy(zero_copy_only=False)
        return Parsed(values, np.isnan(values), np.zeros(len(array), bool))
    except pa.ArrowInvalid:
        text = pc.utf8_trim_whitespace(array.cast(pa.string()))
    words = pa.array(MISSING_WORDS, pa.string())
    missing = _nulls(text) | pc.is_in(pc.utf8_lower(text), value_set=words).to_numpy(zero_copy_only=False)
    shape = r"^[+-]?((\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|inf(inity)?)$"
    numeric = pc.if_else(pc.match_substring_regex(text, shape, ignore_case=True), text, None)
    parsed = _cast_or_null(numeric, pa.float64())
    values = pc.fill_null(parsed, np.nan).to_numpy(zero_copy_only=False)
    return Parsed(values, missing, ~missing & np.isnan(values))


def _instants_in_text(array: pa.Array, unit: str) -> Parsed:
    """Integers exactly (nanoseconds do not fit a float64), anything else by way of float64."""
    try:
        return _scaled(array.cast(pa.int64()), unit)
    except pa.ArrowInvalid:
        text = pc.utf8_trim_whitespace(array.cast(pa.string()))
    whole = pc.fill_null(pc.match_substring_regex(text, r"^-?\d{1,18}$"), False)
    exact = _scaled(pc.if_else(whole, text, None).cast(pa.int64()), unit)
    number = numbers(text)
    inexact = _scaled(pa.array(number.values), unit)
    is_whole = whole.to_numpy(zero_copy_only=False)
    return Parsed(np.where(is_whole, exact.values, inexact.values), number.missing, number.bad)


def _instants_in_iso_text(array: pa.Array) -> Parsed:
    text = pc.utf8_trim_whitespace(array.cast(pa.string()))
    missing = _nulls(text) | _equal(text, "")
    text = pc.replace_substring_regex(text, r"(\.\d{6})\d+", r"\1")
    text = pc.replace_substring_regex(text, r"(\d) ([+-]\d{2}:?\d{2}|[Zz])$", r"\1\2")
    zoned = pc.match_substring_regex(text, ZONE)
    us = pa.timestamp("us")
    with_zone = _cast_or_null(pc.if_else(zoned, text, None), pa.timestamp("us", "UTC"))
    without = _cast_or_null(pc.if_else(zoned, None, text), us)
    instant = pc.coalesce(with_zone.cast(us), without).cast(pa.int64())
    values = pc.fill_null(instant, 0).to_numpy(zero_copy_only=False)
    return Parsed(values, missing, ~missing & _nulls(instant))


def _scaled(array: pa.Array, unit: str) -> Parsed:
    """Counts of `unit` as microseconds; what int64 cannot hold saturates, far outside any valid time."""
    if pa.types.is_integer(array.type):
        values = pc.fill_null(array.cast(pa.int64(), safe=False), 0).to_numpy(zero_copy_only=False)
        missing = _nulls(array)
        if unit == "ns":
            return Parsed(values // 1_000, missing, np.zeros(len(array), bool))
        factor = int(US_PER_UNIT[unit])
        limit = np.iinfo(np.int64).max // factor
        return Parsed(np.clip(values, -limit, limit) * factor, missing, np.zeros(len(array), bool))
    parsed = numbers(array)
    scaled = np.nan_to_num(np.floor(parsed.values * US_PER_UNIT[unit]), nan=0.0)
    return Parsed(np.clip(scaled, -9.2e18, 9.2e18).astype(np.int64), parsed.missing, parsed.bad)


def _cast_or_null(array: pa.Array, to: pa.DataType) -> pa.Array:
    """Cast; what does not parse becomes null, found by halving: cost grows with the bad values only."""
    try:
        return array.cast(to)
    except pa.ArrowInvalid:
        if len(array) == 1:
            return pa.nulls(1, to)
    half = len(array) // 2
    halves = [_cast_or_null(array[:half], to), _cast_or_null(array[half:], to)]
    return pa.concat_arrays(halves)
