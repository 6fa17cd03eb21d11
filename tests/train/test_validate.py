"""What validation keeps of held-out rows."""

import numpy as np
import pyarrow as pa

from recsys_dist.train.validate import user_keys


def test_users_of_any_alphabet_keep_apart_and_in_order() -> None:
    users = ["zoë", "a", "日本", "zoë", "ab", "é"]
    keys = user_keys(pa.chunked_array([users[:2], users[2:]]))
    assert keys.dtype.kind == "S"
    assert [key.decode() for key in keys] == users
    assert [key.decode() for key in np.unique(keys)] == sorted(set(users))
