"""Rows of raw values against counting by hand."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from recsys_dist.data.vocab import Vocabulary

WORDS = st.lists(st.one_of(st.none(), st.sampled_from("abcdefg")), max_size=40)


def fitted(values: list[str | None], min_count: int = 1) -> Vocabulary:
    return Vocabulary.fit(pa.array(values, pa.string()), np.ones(len(values), np.int64), min_count)


@given(WORDS, st.integers(1, 4))
def test_values_are_kept_by_count_then_by_name(values: list[str | None], min_count: int) -> None:
    counted = Counter(v for v in values if v is not None)
    want = [v for v, n in sorted(counted.items(), key=lambda x: (-x[1], x[0])) if n >= min_count]
    vocabulary = fitted(values, min_count)
    assert vocabulary.values.to_pylist() == want
    assert vocabulary.counts.tolist() == [counted[v] for v in want]
    assert vocabulary.rows == len(want) + 1


@given(WORDS, WORDS)
def test_unseen_null_and_rare_values_are_row_0(values: list[str | None], asked: list[str | None]) -> None:
    vocabulary = fitted(values, 2)
    known = vocabulary.values.to_pylist()
    rows = vocabulary.lookup(pa.array(asked, pa.string()))
    assert rows.dtype == np.int32
    assert rows.tolist() == [known.index(v) + 1 if v in known else 0 for v in asked]


def test_numbers_and_chunks_are_looked_up_as_text() -> None:
    vocabulary = fitted(["7", "7", "12"])
    column = pa.chunked_array([pa.array([12, None]), pa.array([7, 3])])
    assert vocabulary.lookup(column).tolist() == [2, 0, 1, 0]
    assert vocabulary.lookup(pa.chunked_array([], pa.int64())).tolist() == []


def test_repeated_values_add_their_counts_up() -> None:
    vocabulary = Vocabulary.fit(pa.array(["a", "b", "a", "c"]), np.array([2, 4, 3, 0]), 1)
    assert vocabulary.values.to_pylist() == ["a", "b"]
    assert vocabulary.counts.tolist() == [5, 4]


@given(WORDS, WORDS, st.integers(1, 3))
def test_merging_moves_no_row_and_appends_what_is_new(
    old: list[str | None], new: list[str | None], min_count: int
) -> None:
    before = fitted(old)
    after = before.merge(pa.array(new, pa.string()), np.ones(len(new), np.int64), min_count)
    assert after.values.to_pylist()[: len(before.values)] == before.values.to_pylist()
    was, now = (Counter(v for v in values if v is not None) for values in (old, new))
    fresh = {v: n for v, n in now.items() if v not in was and n >= min_count}
    assert set(after.values.to_pylist()) == set(was) | set(fresh)
    assert dict(zip(after.values.to_pylist(), after.counts.tolist(), strict=True)) == {
        v: was[v] + now[v] for v in set(was) | set(fresh)
    }


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    for number, values in enumerate(([], ["a"], ["ä", "ä", "b", "", "c\n"])):
        vocabulary = fitted(list(values))
        vocabulary.save(tmp_path / f"{number}.parquet")
        again = Vocabulary.load(tmp_path / f"{number}.parquet")
        assert again.values.equals(vocabulary.values)
        assert again.counts.tolist() == vocabulary.counts.tolist()
