"""Pure column functions from raw values to model inputs, shared by the offline pipeline and online requests.

Each takes whole columns and returns a numpy array with a value per row; none knows where the
column came from. n rows.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pandas.util import hash_array

DAY_US = 86_400_000_000
HOUR_US = 3_600_000_000
MINUTE_US = 60_000_000
_NO_WORD = r"[^\p{L}\p{M}\p{N}]+"


@dataclass(frozen=True)
class Scale:
    """Standardisation fitted on training rows: (x - mean) / deviation, after log1p where `log`."""

    mean: float
    deviation: float
    log: bool

    @classmethod
    def fit(cls, values: np.ndarray, counts: np.ndarray, log: bool) -> "Scale":
        """From values that occurred `counts` times; NaN values are missing and count for nothing."""
        known = np.isfinite(values) & (counts > 0)
        if not known.any():
            return cls(0.0, 1.0, log)
        x, weight = _logged(values[known], log), counts[known]
        if x.min() == x.max():  # its average may be off by a rounding, and its deviation be that
            return cls(float(x[0]), 1.0, log)
        mean = float(np.average(x, weights=weight))
        deviation = float(np.sqrt(np.average((x - mean) ** 2, weights=weight)))
        return cls(mean, deviation or 1.0, log)  # 0 where squares underflow


def standardise(column: pa.Array | pa.ChunkedArray, scale: Scale) -> np.ndarray:
    """[n] float32; a missing value becomes 0, the mean."""
    return scaled(floats(column), scale)


def scaled(values: np.ndarray, scale: Scale) -> np.ndarray:
    """[n] float32 (x - mean) / deviation of values [n]; NaN becomes 0, the mean.

    What float32 cannot hold becomes its largest number.
    """
    x = _logged(values, scale.log)
    most = np.finfo(np.float32).max
    return np.clip(np.nan_to_num((x - scale.mean) / scale.deviation, nan=0.0), -most, most).astype(np.float32)


def quantile_bounds(values: np.ndarray, counts: np.ndarray, buckets: int) -> np.ndarray:
    """Ascending inner bounds that cut the counted values into at most `buckets` equally full buckets."""
    known = np.isfinite(values) & (counts > 0)
    order = np.argsort(values[known], kind="stable")
    x, weight = values[known][order], counts[known][order]
    if not len(x):
        return np.empty(0)
    below = np.cumsum(weight) / weight.sum()
    at = np.searchsorted(below, np.arange(1, buckets) / buckets)
    return np.unique(x[np.minimum(at, len(x) - 1)])


def distribution(values: np.ndarray, counts: np.ndarray, most: int = 1_000) -> np.ndarray:
    """[k, 2] values, ascending, with the share of counted ones below (ties half); k ≤ about `most`."""
    known = np.isfinite(values) & (counts > 0)
    x, group = np.unique(values[known], return_inverse=True)
    if not len(x):
        return np.array([[0.0, 0.5]])
    weight = np.bincount(group, counts[known], len(x))
    below = (np.cumsum(weight) - weight / 2) / weight.sum()
    kept = np.unique(np.searchsorted(below, np.linspace(below[0], below[-1], min(most, len(x)))))
    return np.stack([x, below], axis=1)[kept] if len(x) > most else np.stack([x, below], axis=1)


def quantile(column: pa.Array | pa.ChunkedArray, points: np.ndarray, power: float) -> np.ndarray:
    """[n] float32 share below each value by `distribution`'s points, to `power`; missing is the median."""
    x = floats(column)
    share = np.where(np.isfinite(x), np.interp(x, points[:, 0], points[:, 1]), 0.5)
    return (share**power).astype(np.float32)


def bucketise(column: pa.Array | pa.ChunkedArray, bounds: np.ndarray) -> np.ndarray:
    """[n] int32 in 1..len(bounds)+1; row 0 where the value is missing."""
    x = floats(column)
    rows = 1 + np.searchsorted(bounds, x, side="left")
    return np.where(np.isfinite(x), rows, 0).astype(np.int32)


def hash_rows(column: pa.Array | pa.ChunkedArray, buckets: int) -> np.ndarray:
    """[n] int32 in 1..buckets by a hash that is the same in every process; row 0 where null."""
    text = column.cast(pa.string())
    rows = 1 + (hash_text(text) % np.uint64(buckets)).astype(np.int64)
    return np.where(np.asarray(text.is_null()), 0, rows).astype(np.int32)


def hash_text(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """[n] uint64 SipHash of text, the same in every process; null hashes as the empty text."""
    flat = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return hash_array(flat.fill_null("").to_numpy(zero_copy_only=False))


def cross(parts: list[np.ndarray], buckets: int) -> np.ndarray:
    """[n] int32 in 1..buckets: the hashed combination of id columns; row 0 where any part is unknown."""
    mixed = np.zeros(len(parts[0]), np.uint64)
    known = np.ones(len(parts[0]), bool)
    for part in parts:
        mixed = mix(mixed ^ part.astype(np.uint64))
        known &= part > 0
    rows = 1 + (mixed % np.uint64(buckets)).astype(np.int64)
    return np.where(known, rows, 0).astype(np.int32)


def words(texts: pa.StringArray, bigrams: bool, buckets: int) -> pa.ListArray:
    """[n] lists of int32 in 1..buckets: the hashed words of each text, then its pairs of adjacent words.

    Words are runs of letters, marks and digits, in Unicode's NFKC and lower case; a null text has none.
    """
    plain = pc.utf8_lower(pc.utf8_normalize(pc.fill_null(texts, ""), "NFKC"))
    listed = pc.split_pattern(pc.utf8_trim_whitespace(pc.replace_substring_regex(plain, _NO_WORD, " ")), " ")
    found, text = listed.flatten(), np.asarray(pc.list_parent_indices(listed))
    kept = np.asarray(pc.not_equal(found, ""))  # what a text without words splits into
    hashed, text = hash_text(found.filter(pa.array(kept))), text[kept]
    if bigrams:
        at = np.flatnonzero(text[1:] == text[:-1])
        hashed = np.r_[hashed, mix(mix(hashed[at]) ^ hashed[at + 1])]
        text = np.r_[text, text[at]]
    order = np.argsort(text, kind="stable")
    rows = 1 + (hashed[order] % np.uint64(buckets)).astype(np.int32)
    offsets = np.searchsorted(text[order], np.arange(len(texts) + 1)).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(rows))


def mix(x: np.ndarray) -> np.ndarray:
    """[n] uint64: the finaliser of splitmix64 (Steele et al., OOPSLA 2014), a bijection that mixes bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hour(timestamp_us: np.ndarray, utc_offset_hours: float) -> np.ndarray:
    """[n] int32: local hour + 1, in 1..24."""
    return (1 + (timestamp_us + int(utc_offset_hours * HOUR_US)) // HOUR_US % 24).astype(np.int32)


def weekday(timestamp_us: np.ndarray, utc_offset_hours: float) -> np.ndarray:
    """[n] int32: local weekday + 1, Monday first, in 1..7; the Unix epoch was a Thursday."""
    return (1 + (day(timestamp_us, utc_offset_hours) + 3) % 7).astype(np.int32)


def day(timestamp_us: np.ndarray, utc_offset_hours: float) -> np.ndarray:
    """[n] int64: local days since the epoch."""
    return (timestamp_us + int(utc_offset_hours * HOUR_US)) // DAY_US


def past_count(count: np.ndarray) -> np.ndarray:
    """[n] float32: log1p of how often the key was seen before."""
    return np.log1p(count).astype(np.float32)


def past_rate(count: np.ndarray, positives: np.ndarray, prior: float, smoothing: float) -> np.ndarray:
    """[n] float32: log-odds of the smoothed past label rate, less the log-odds of the prior.

    rate = (positives + smoothing x prior) / (count + smoothing); 0 where nothing was seen.
    """
    prior = float(np.clip(prior, 1e-6, 1 - 1e-6))
    rate = (positives + smoothing * prior) / (count + smoothing)
    return (np.log(rate / (1 - rate)) - np.log(prior / (1 - prior))).astype(np.float32)


def floats(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """[n] float64 with NaN for null."""
    cast = pc.cast(column, pa.float64())
    flat = cast.combine_chunks() if isinstance(cast, pa.ChunkedArray) else cast
    return flat.to_numpy(zero_copy_only=False)


def _logged(x: np.ndarray, log: bool) -> np.ndarray:
    return np.log1p(np.maximum(x, 0)) if log else x


def sessions(timestamp_us: np.ndarray, offsets: np.ndarray, gap_us: int, most: int) -> np.ndarray:
    """int32 number of each event's session, back from its list's newest, which is 1; at most `most`.

    Lists lie one after another in `timestamp_us`, ascending, from `offsets[i]` to `offsets[i + 1]`.
    """
    begins = np.cumsum(np.diff(timestamp_us, prepend=timestamp_us[:1]) > gap_us)
    lengths = np.diff(offsets)
    newest = np.repeat(offsets[1:] - 1, lengths)
    return np.minimum(1 + begins[newest] - begins, most).astype(np.int32)
