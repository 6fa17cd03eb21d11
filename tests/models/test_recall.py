"""What recall models share: how negatives are drawn, and item tables read whole."""

import numpy as np
import pytest
import torch
from torchrec import JaggedTensor

from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError
from recsys_dist.models.layers import embedding_tables, normal
from recsys_dist.models.recall import (
    Negatives,
    all_vectors,
    each,
    ending_with,
    every_row,
    following,
    item_tables,
    listed,
    lookup,
    newest,
    one_id,
    vectors_of,
)
from recsys_dist.train.sharding import materialise
from tests.batches import random_batch, small_schema


def test_negatives_follow_their_distribution_and_the_step() -> None:
    q = Negatives(torch.tensor([7, 0, 3, 8]), 1, alpha=0.5, seed=0).q_I
    np.testing.assert_allclose(q, [0, 1 / 6, 2 / 6, 3 / 6])  # √1, √4, √9; the unknown item never
    np.testing.assert_allclose(Negatives(torch.tensor([7, 0, 3]), 1, 0.0, 0).q_I, [0, 0.5, 0.5])
    negatives = Negatives(torch.arange(40), 20_000, alpha=1, seed=0)
    drawn = negatives.draw(1).numpy()
    assert np.array_equal(drawn, negatives.draw(1)) and not np.array_equal(drawn, negatives.draw(2))
    np.testing.assert_allclose(np.bincount(drawn, minlength=40) / 20_000, negatives.q_I, atol=0.006)
    assert drawn.min() >= 1
    np.testing.assert_allclose(np.exp(negatives.log_q_I[1:].numpy()), negatives.q_I[1:], rtol=1e-6)


def test_a_catalogue_without_items_is_refused() -> None:
    with pytest.raises(ConfigError, match="no item besides the unknown one"):
        Negatives(torch.zeros(1), 1, 1.0, 0)


def test_lookups_read_the_table_by_row() -> None:
    schema = small_schema()
    tables = materialise(embedding_tables(schema, [schema.item_id], 4, normal(1)), 0)
    weight = tables.embedding_bags["item"].weight
    torch.testing.assert_close(every_row(tables, "item", 40, torch.device("cpu")), weight)
    found = lookup(tables, "item", torch.tensor([5, 3]), torch.tensor([1, 0, 1]))
    torch.testing.assert_close(found, torch.stack([weight[5], torch.zeros(4), weight[3]]))


def test_candidates_that_a_rows_list_holds() -> None:
    lists = JaggedTensor(torch.tensor([4, 9, 9, 30, 2]), lengths=torch.tensor([3, 0, 1, 1]))
    held = listed(lists, torch.tensor([9, 2, 5, 9, 4]))
    assert held.int().tolist() == [[1, 0, 0, 1, 1], [0] * 5, [0] * 5, [0, 1, 0, 0, 0]]
    empty = JaggedTensor(torch.empty(0, dtype=torch.int64), lengths=torch.tensor([0]))
    assert listed(empty, torch.tensor([1])).tolist() == [[False]]


def test_one_id_per_row_and_none_for_padding() -> None:
    batch = random_batch(small_schema(), 3, rng_for(0, "ids"), {"item": np.array([7, 2, 9])}).pad(5)
    assert one_id(batch.sparse, "item").tolist() == [7, 2, 9, 0, 0]


def rows(jagged: JaggedTensor) -> list[list[int]]:
    return [ids.tolist() for ids in jagged.to_dense()]


def test_sequences_are_cut_sorted_and_followed() -> None:
    lengths = torch.tensor([3, 0, 5, 1, 0], dtype=torch.int32)
    past = JaggedTensor(torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 9], dtype=torch.int32), lengths=lengths)
    cut, of = newest(past, 2)
    assert of.tolist() == [1, 3, 4, 0, 2] and rows(cut) == [[0], [9], [0], [2, 3], [7, 8]]
    last = torch.tensor([10, 11, 12, 13, 14], dtype=torch.int32)
    assert following(cut, last).tolist() == [10, 11, 12, 3, 13, 8, 14]
    assert rows(ending_with(cut, last)) == [[0, 10], [9, 11], [0, 12], [2, 3, 13], [7, 8, 14]]


def test_sequence_tables_give_a_vector_per_id_of_each_feature() -> None:
    tables = item_tables(small_schema().item_id, 4, 1.0, {"item": ["watched"], "out": ["item"]})
    materialise(tables, 0)
    item, out = (tables.embeddings[name].weight for name in ("item", "out"))
    past = JaggedTensor(torch.tensor([5, 3, 8]), lengths=torch.tensor([2, 0, 1]))
    found = vectors_of(tables, {"watched": past, "item": each(torch.tensor([7, 2, 7, 1]))})
    torch.testing.assert_close(found["watched"], item[[5, 3, 8]])
    torch.testing.assert_close(found["item"], out[[7, 2, 7, 1]])
    torch.testing.assert_close(all_vectors(tables, "item", ["watched"], 40, torch.device("cpu")), out)
