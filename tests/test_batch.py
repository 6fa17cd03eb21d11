import torch
from torchrec import KeyedJaggedTensor

from recsys_dist.batch import Batch


def two_rows() -> Batch:
    """Row 0: user 4, watched [7, 8]; row 1: user 5, watched nothing."""
    return Batch(
        dense=torch.tensor([[0.5], [1.5]]),
        sparse=KeyedJaggedTensor(
            keys=["user", "watched"],
            values=torch.tensor([4, 5, 7, 8], dtype=torch.int32),
            lengths=torch.tensor([1, 1, 2, 0], dtype=torch.int32),
        ),
        labels={"click": torch.tensor([1.0, 0.0])},
        weight=torch.ones(2),
        row_id=torch.tensor([10, 11]),
    )


def ids(batch: Batch, key: str) -> list[list[int]]:
    return [row.tolist() for row in batch.sparse[key].to_dense()]


def test_padding_rows_are_empty_and_weigh_nothing() -> None:
    padded = two_rows().pad(4)
    assert padded.rows == 4
    assert padded.sparse.stride() == 4
    assert ids(padded, "user") == [[4], [5], [], []]
    assert ids(padded, "watched") == [[7, 8], [], [], []]
    assert padded.dense.flatten().tolist() == [0.5, 1.5, 0, 0]
    assert padded.labels["click"].tolist() == [1, 0, 0, 0]
    assert padded.weight.tolist() == [1, 1, 0, 0]
    assert padded.row_id.tolist() == [10, 11, -1, -1]


def test_padding_to_the_same_size_is_the_batch_itself() -> None:
    batch = two_rows()
    assert batch.pad(2) is batch


def test_moving_keeps_every_tensor_and_type() -> None:
    batch = two_rows()
    moved = batch.to(torch.device("cpu"))
    assert ids(moved, "watched") == ids(batch, "watched")
    assert moved.sparse.values().dtype == torch.int32
    assert moved.labels.keys() == batch.labels.keys()
    for mine, theirs in zip((moved.dense, moved.weight), (batch.dense, batch.weight), strict=True):
        torch.testing.assert_close(mine, theirs)
