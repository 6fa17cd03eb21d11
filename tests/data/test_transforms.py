"""Column functions against numbers computed by hand and the standard library."""

import datetime as dt
import math
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recsys_dist.data import transforms
from recsys_dist.data.transforms import Scale

MOMENTS = st.datetimes(dt.datetime(1950, 1, 1), dt.datetime(2100, 1, 1))
EPOCH = dt.datetime(1970, 1, 1)


def microseconds(moment: dt.datetime) -> np.ndarray:
    return np.array([(moment - EPOCH) // dt.timedelta(microseconds=1)])


@given(MOMENTS, st.sampled_from([-12, -9.5, -3.5, 0, 5.75, 8, 14]))
def test_local_hour_weekday_and_day_are_the_calendars(moment: dt.datetime, offset: float) -> None:
    local = moment + dt.timedelta(hours=offset)
    us = microseconds(moment)
    assert transforms.hour(us, offset).tolist() == [local.hour + 1]
    assert transforms.weekday(us, offset).tolist() == [local.isoweekday()]
    assert transforms.day(us, offset).tolist() == [(local.date() - EPOCH.date()).days]


def test_the_epoch_was_a_thursday() -> None:
    assert transforms.weekday(np.array([0, -1]), 0).tolist() == [4, 3]


def test_a_scale_has_mean_0_and_deviation_1_and_ignores_the_missing() -> None:
    values, counts = np.array([1.0, 3.0, np.nan, 1e9]), np.array([3, 1, 5, 0])
    scale = Scale.fit(values, counts, log=False)  # 1, 1, 1, 3
    assert (scale.mean, scale.deviation) == (1.5, pytest.approx(math.sqrt(0.75)))
    got = transforms.standardise(pa.array([1.0, 3.0, None, float("nan")]), scale)
    assert got.dtype == np.float32
    assert got.tolist() == pytest.approx([-0.5 / math.sqrt(0.75), 1.5 / math.sqrt(0.75), 0, 0])


def test_a_value_beyond_what_float32_holds_stays_finite() -> None:
    scale = Scale.fit(np.array([0.0, 1.0]), np.ones(2), log=False)
    got = transforms.scaled(np.array([1e300, -1e300, np.nan]), scale)
    assert np.isfinite(got).all() and got[0] == -got[1] == np.finfo(np.float32).max


def test_a_logarithmic_scale_takes_log1p_and_negative_as_zero() -> None:
    scale = Scale.fit(np.array([0.0, math.e - 1]), np.array([1, 1]), log=True)
    assert (scale.mean, scale.deviation) == (pytest.approx(0.5), pytest.approx(0.5))
    assert transforms.standardise(pa.array([-5, 0]), scale).tolist() == pytest.approx([-1, -1])


@pytest.mark.parametrize("log", [False, True])
def test_a_constant_has_no_deviation_of_roundings(log: bool) -> None:
    """The mean of n equal numbers is often one rounding off."""
    for value in np.arange(1, 400) / 100:
        for count in (3, 7, 49):
            scale = Scale.fit(np.array([value, np.nan]), np.array([count, 2]), log)
            assert scale.deviation == 1.0 and transforms.scaled(np.array([value]), scale)[0] == 0


def test_a_constant_or_unknown_column_becomes_0() -> None:
    constant = Scale.fit(np.array([4.0]), np.array([9]), log=False)
    assert transforms.standardise(pa.array([4, None]), constant).tolist() == [0, 0]
    assert Scale.fit(np.array([np.nan]), np.array([9]), log=False) == Scale(0.0, 1.0, False)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(2, 8))
def test_no_quantile_bucket_is_fuller_than_its_share_and_one_value(values: list[float], buckets: int) -> None:
    column = np.array(values)
    bounds = transforms.quantile_bounds(column, np.ones(len(column), np.int64), buckets)
    assert np.all(np.diff(bounds) > 0)
    rows = transforms.bucketise(pa.array(column), bounds)
    assert rows.min() >= 1 and rows.max() <= len(bounds) + 1 <= buckets
    for row in np.unique(rows):
        inside = column[rows == row]
        most_of_one_value = np.unique(inside, return_counts=True)[1].max()
        assert len(inside) <= len(column) / buckets + most_of_one_value
    by_value = rows[np.argsort(column, kind="stable")]
    assert np.all(np.diff(by_value) >= 0)


def test_distinct_values_fill_buckets_equally_and_counts_weigh() -> None:
    values = np.random.default_rng(0).permutation(100).astype(float)
    bounds = transforms.quantile_bounds(values, np.ones(100, np.int64), 5)
    assert np.bincount(transforms.bucketise(pa.array(values), bounds)).tolist() == [0, 20, 20, 20, 20, 20]
    assert transforms.quantile_bounds(np.array([1.0, 2.0, 3.0]), np.array([2, 1, 1]), 2).tolist() == [1.0]


def test_missing_numbers_are_in_bucket_0() -> None:
    column = pa.chunked_array([pa.array([None, float("nan")]), pa.array([-1e9, 0.5, 1e9])])
    assert transforms.bucketise(column, np.array([0.0, 1.0])).tolist() == [0, 0, 1, 2, 3]
    assert transforms.quantile_bounds(np.array([np.nan]), np.array([1]), 4).tolist() == []
    assert transforms.bucketise(pa.array([3.0, None]), np.empty(0)).tolist() == [1, 0]


def siphash(text: str, key: bytes) -> int:
    """SipHash-2-4 (Aumasson and Bernstein, INDOCRYPT 2012), step by step."""
    data = text.encode()
    data = data + bytes(-(len(data) + 1) % 8) + bytes([len(data) % 256])
    k0, k1 = (int.from_bytes(key[i : i + 8], "little") for i in (0, 8))
    magic = (0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573)
    v = [a ^ b for a, b in zip(magic, (k0, k1, k0, k1), strict=True)]

    def turned(x: int, bits: int) -> int:
        return (x << bits | x >> (64 - bits)) % 2**64

    def rounds(count: int) -> None:
        for _ in range(count):
            for a, b, turn in ((0, 1, 13), (2, 3, 16), (0, 3, 21), (2, 1, 17)):
                v[a] = (v[a] + v[b]) % 2**64
                v[b] = turned(v[b], turn) ^ v[a]
                if turn in (13, 17):
                    v[a] = turned(v[a], 32)

    for at in range(0, len(data), 8):
        word = int.from_bytes(data[at : at + 8], "little")
        v[3] ^= word
        rounds(2)
        v[0] ^= word
    v[2] ^= 0xFF
    rounds(4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def mixed(x: int) -> int:
    """The finaliser of splitmix64."""
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
    return x ^ x >> 31


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), max_size=4))
def test_hashes_are_siphash_and_mixed(words: list[str]) -> None:
    """Tables are trained on these numbers: another version of what computes them must not change them."""
    got = transforms.hash_text(pa.array(words, pa.string()))
    assert got.tolist() == [mixed(siphash(word, b"0123456789123456")) for word in words]


def test_hashes_are_the_same_in_another_process() -> None:
    code = (
        "import pyarrow as pa; from recsys_dist.data import transforms as t;"
        "print(t.hash_rows(pa.array(['u1', '', None, 'x']), 1000).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "7"}, check=True
    )
    here = transforms.hash_rows(pa.array(["u1", "", None, "x"]), 1000)
    assert done.stdout.strip() == str(here.tolist())
    assert here[2] == 0


def test_a_hash_is_of_the_value_not_of_its_neighbours() -> None:
    words = [f"w{n}" for n in range(300)] + [None]
    rows = transforms.hash_rows(pa.chunked_array([words[:7], words[7:]]), 50)
    assert rows.dtype == np.int32
    assert rows.tolist() == [transforms.hash_rows(pa.array([w], pa.string()), 50)[0] for w in words]
    assert set(rows[:-1]) == set(range(1, 51))


def test_a_cross_tells_pairs_apart_and_is_0_where_a_part_is() -> None:
    left, right = (grid.ravel().astype(np.int32) for grid in np.meshgrid(np.arange(30), np.arange(30)))
    rows = transforms.cross([left, right], 1 << 30)
    unknown = (left == 0) | (right == 0)
    assert rows.dtype == np.int32
    assert np.array_equal(rows == 0, unknown)
    assert len(set(rows[~unknown].tolist())) == 29 * 29  # order matters: (1, 2) is not (2, 1)
    assert transforms.cross([left, right], 7).max() == 7
    assert transforms.cross([np.array([3]), np.array([5])], 1_000).tolist() == [640]  # must never change


def test_splitmix64_gives_its_published_sequence() -> None:
    """First outputs for seed 1234567, from the test vectors of Vigna's reference implementation."""
    gamma = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + n * gamma) % 2**64 for n in range(3)], np.uint64)
    want = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert transforms.mix(states).tolist() == want


def test_past_rates_are_smoothed_log_odds() -> None:
    got = transforms.past_rate(np.array([0, 8, 8]), np.array([0, 8, 0]), prior=0.25, smoothing=2)
    odds = [math.log(rate / (1 - rate)) - math.log(0.25 / 0.75) for rate in (0.25, 8.5 / 10, 0.5 / 10)]
    assert got.tolist() == pytest.approx(odds, abs=1e-6)
    for prior in (0.0, 1.0):
        assert np.isfinite(transforms.past_rate(np.array([5]), np.array([5.0 * prior]), prior, 20)).all()
    assert transforms.past_count(np.array([0, 9])).tolist() == pytest.approx([0, math.log(10)])


def test_quantiles_are_the_share_below_with_ties_in_the_middle() -> None:
    points = transforms.distribution(np.array([5.0, 1.0, 5.0, 9.0, np.nan]), np.array([1, 1, 1, 1, 7]))
    np.testing.assert_allclose(points, [[1, 0.125], [5, 0.5], [9, 0.875]])
    column = pa.array([1.0, 3.0, 5.0, 100.0, None])
    np.testing.assert_allclose(transforms.quantile(column, points, 1.0), [0.125, 0.3125, 0.5, 0.875, 0.5])
    np.testing.assert_allclose(
        transforms.quantile(column, points, 0.5) ** 2, transforms.quantile(column, points, 1.0), rtol=1e-6
    )


def test_many_values_are_thinned_and_stay_a_distribution() -> None:
    values = np.random.default_rng(0).exponential(size=20_000)
    points = transforms.distribution(values, np.ones(20_000), most=100)
    assert len(points) <= 101 and (np.diff(points, axis=0) > 0).all()
    share = transforms.quantile(pa.array(np.sort(values)), points, 1.0)
    np.testing.assert_allclose(share, (np.arange(20_000) + 0.5) / 20_000, atol=0.005)  # half of 1 %


def test_words_and_pairs_of_adjacent_ones() -> None:
    texts = pa.array(
        ["Red shoes!", None, "", "  ?!", "RED  Shoes", "\uff52\uff45\uff44", "naïve café 5", "a b", "b a"]
    )
    listed = transforms.words(texts, True, 1_000_000).to_pylist()
    red_shoes, *nothing = listed[:4]
    assert nothing == [[], [], []] and len(red_shoes) == 3 and listed[4] == red_shoes
    assert listed[5] == red_shoes[:1]  # full-width letters are letters
    assert len(set(listed[6])) == 5
    assert set(listed[7][:2]) == set(listed[8][:2]) and listed[7][2] != listed[8][2]  # order is the pair's
    assert transforms.words(texts, False, 1_000_000).to_pylist()[6] == listed[6][:3]
    assert red_shoes == [630702, 731977, 805133]  # must never change
    assert set(transforms.words(texts, True, 2).flatten().to_pylist()) == {1, 2}
    for none in (texts[:0], texts[1:4]):
        assert transforms.words(none, True, 10).flatten().to_pylist() == []
