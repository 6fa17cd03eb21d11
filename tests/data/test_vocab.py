"""Rows of raw values against counting by hand."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from recsys_dist.data.vocab import Vocabulary

WORDS = st.lists(st.one_of(st.none(), st.sampled_from("abcdefg")), max_size=40)


def fitted(values: list[str | None]) -> Vocabulary:
    return Vocabulary.fit(pa.array(values, pa.string()), np.ones(len(values), np.int64))


@given(WORDS)
def test_values_are_listed_by_count_then_by_name(values: list[str | None]) -> None:
    counted = Counter(v for v in values if v is not None)
    want = [v for v, _ in sorted(counted.items(), key=lambda x: (-x[1], x[0]))]
    vocabulary = fitted(values)
    assert vocabulary.values.to_pylist() == want
    assert vocabulary.counts.tolist() == [counted[v] for v in want]
    assert vocabulary.rows == len(want) + 1


@given(WORDS, WORDS)
def test_unseen_and_null_values_are_row_0(values: list[str | None], asked: list[str | None]) -> None:
    vocabulary = fitted(values)
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
    vocabulary = Vocabulary.fit(pa.array(["a", "b", "a", "c"]), np.array([2, 4, 3, 0]))
    assert vocabulary.values.to_pylist() == ["a", "b"]
    assert vocabulary.counts.tolist() == [5, 4]


@given(WORDS, WORDS)
def test_values_keep_the_rows_of_a_former_vocabulary(old: list[str | None], new: list[str | None]) -> None:
    before, anew = fitted(old), fitted(new)
    after = anew.numbered_as(before)
    assert sorted(zip(after.values.to_pylist(), after.counts.tolist(), strict=True)) == sorted(
        zip(anew.values.to_pylist(), anew.counts.tolist(), strict=True)
    )
    was = {value: row for row, value in enumerate(before.values.to_pylist(), 1)}
    now = {value: row for row, value in enumerate(after.values.to_pylist(), 1)}
    assert all(now[value] == row for value, row in was.items() if value in now and row < after.rows)
    others = [value for value in anew.values.to_pylist() if now[value] != was.get(value)]
    assert sorted(others, key=lambda value: now[value]) == others, "the most frequent first"


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    for number, values in enumerate(([], ["a"], ["ä", "ä", "b", "", "c\n"])):
        vocabulary = fitted(list(values))
        vocabulary.save(tmp_path / f"{number}.parquet")
        again = Vocabulary.load(tmp_path / f"{number}.parquet")
        assert again.values.equals(vocabulary.values)
        assert again.counts.tolist() == vocabulary.counts.tolist()
