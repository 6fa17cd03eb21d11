"""DLRM's interaction against dots taken one by one."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError
from recsys_dist.feature_kinds import Numeric
from recsys_dist.models.dlrm import Config, Model
from recsys_dist.train.sharding import materialise
from tests.batches import random_batch, small_schema


def test_the_top_reads_the_floats_and_every_pair_of_dots_once() -> None:
    torch.manual_seed(0)
    model = materialise(Model(Config(embedding_dim=4), small_schema()), 0).double().eval()
    batch = random_batch(small_schema(), 3, rng_for(0, "rows"))
    batch = replace(batch, dense=batch.dense.double())
    fields = model.fields(batch.sparse)[0].detach().numpy()
    floats = model.bottom(batch.dense).detach().numpy()
    rows = []
    for row, d in zip(fields, floats, strict=True):
        vectors = [d, *row]
        rows.append([*d, *(a @ b for i, a in enumerate(vectors) for b in vectors[i + 1 :])])
    assert np.shape(rows) == (3, 4 + 8 * 7 // 2)
    torch.testing.assert_close(model.logits(batch), model.top(torch.tensor(np.array(rows))))


def test_cat_hands_the_vectors_themselves_to_the_top() -> None:
    torch.manual_seed(0)
    model = materialise(Model(Config(embedding_dim=4, interaction="cat"), small_schema()), 0).eval()
    batch = random_batch(small_schema(), 3, rng_for(0, "rows"))
    vectors = [model.bottom(batch.dense)[:, None], model.fields(batch.sparse)[0]]
    torch.testing.assert_close(model.logits(batch), model.top(torch.cat(vectors, dim=1).reshape(3, 8 * 4)))


def test_a_schema_without_floats_has_no_bottom() -> None:
    schema = small_schema()
    ids = schema.select(f.name for f in schema.features if not isinstance(f, Numeric))
    model = materialise(Model(Config(embedding_dim=4), ids), 0)
    assert model.bottom is None and model.top.layers[0].in_features == 7 * 6 // 2
    assert model(random_batch(ids, 3, rng_for(0, "rows"))).shape == (3,)


def test_one_field_without_anything_to_interact_with_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dlrm: 'item' alone.*interaction=cat"):
        Model.inputs(small_schema(), Config(features=("item",)))
    assert Model.inputs(small_schema(), Config(features=("item",), interaction="cat")).ids
