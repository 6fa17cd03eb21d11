"""Both ways of looking keys up agree with a plain list."""

import pyarrow as pa
import pytest

from recsys_dist.data.keys import Keys


@pytest.mark.parametrize("copies", [1, 1_000], ids=["few", "many"])
def test_positions_count_from_one_and_zero_is_unknown(copies: int) -> None:
    values = [f"k{number}" for number in range(500)]
    asked = ["k0", None, "k499", "other", "", "k7"] * copies
    expected = [values.index(key) + 1 if key in values else 0 for key in asked]
    column = pa.chunked_array([asked[:2], asked[2:]], pa.string())
    keys = Keys(pa.array(values))
    assert keys.positions(column).tolist() == expected
    assert keys.positions(column.combine_chunks()).tolist() == expected


def test_no_keys_know_nothing() -> None:
    assert Keys(pa.array([], pa.string())).positions(pa.array(["a"])).tolist() == [0]
