"""Wide & Deep against equation 3 of the paper in NumPy, and what each part reads."""

import dataclasses

import numpy as np
import pytest
import torch

from recsys_dist.config import rng_for
from recsys_dist.errors import ConfigError
from recsys_dist.models.wide_deep import Config, Model
from recsys_dist.train.sharding import materialise
from tests.batches import random_batch, small_schema


def build(cfg: Config) -> Model:
    torch.manual_seed(0)
    model = materialise(Model(cfg, Model.inputs(small_schema(), cfg)), 0).eval()
    for name, parameter in model.named_parameters():
        if "wide" in name:  # starts at zero; give the test something to see
            torch.nn.init.normal_(parameter)
    return model


def weights(model: Model) -> dict[str, np.ndarray]:
    return {n: bag.weight.detach().double().numpy() for n, bag in model.fields.tables.embedding_bags.items()}


def test_logit_is_equation_3() -> None:
    model = build(Config(hidden=(8,)))
    schema = Model.inputs(small_schema(), Config())
    batch = random_batch(schema, 6, rng_for(0, "rows"))
    deep = weights(model)
    wide = deep.pop("wide")
    (w1, b1), (w2, b2) = (
        (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy())
        for layer in model.tower.layers
        if isinstance(layer, torch.nn.Linear)
    )
    ids = {f.name: [i.tolist() for i in batch.sparse[f.name].to_dense()] for f in schema.ids}
    for row, logit in enumerate(model(batch).tolist()):
        embedded = [
            deep[schema.table(f)][ids[f.name][row]].mean(axis=0) if ids[f.name][row] else np.zeros(16)
            for name in model.fields.names
            for f in schema.ids
            if f.name == name
        ]
        activation = np.maximum(w1 @ np.concatenate([*embedded, batch.dense[row].double().numpy()]) + b1, 0)
        linear = sum(
            wide[model.fields.wide_rows[f.name] + ids[f.name][row][0]].mean() for f in schema.singles
        )
        assert logit == pytest.approx((w2 @ activation + b2).item() + linear, rel=1e-4)


def test_crosses_go_wide_and_lists_go_deep() -> None:
    model = build(Config())
    assert list(model.fields.wide_rows) == ["user", "item", "author", "hour", "user_x_author"]
    assert list(model.fields.wide_rows.values()) == [0, 30, 70, 82, 107], (
        "each feature after the rows of those before"
    )
    assert sorted(weights(model)) == ["author", "hour", "item", "searched", "user", "wide"]
    assert model.fields.names == ["user", "item", "author", "hour", "watched", "watched_authors", "searched"]
    chosen = build(Config(wide=("user_x_author", "hour")))
    assert list(chosen.fields.wide_rows) == ["user_x_author", "hour"]
    assert len(weights(chosen)["wide"]) == 64 + 25
    assert set(chosen.table_groups()) == {"deep", "wide"}
    assert set(build(Config(wide=())).table_groups()) == {"deep"}


def test_joint_gradient_of_both_parts_is_the_residual() -> None:
    """dL/dw of a one-hot weight is the sum over its rows of sigmoid(z) - y, of the joint logit z."""
    model = build(Config())
    batch = random_batch(Model.inputs(small_schema(), Config()), 40, rng_for(1, "rows"))
    model.loss(batch, 0).sum().backward()
    residual = (torch.sigmoid(model(batch)) - batch.labels["click"]).detach()
    gradient = model.fields.tables.embedding_bags["wide"].weight.grad.sum(dim=1)[
        model.fields.wide_rows["hour"] :
    ][:25]
    expected = torch.zeros(25).index_add(0, batch.sparse["hour"].values().long(), residual)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("norm", "wide"), [(None, None), ("batch", None), (None, ()), (None, ("item",))])
def test_parts_of_user_and_item_join_to_the_whole(norm: str | None, wide: tuple[str, ...] | None) -> None:
    model = build(Config(hidden=(8, 4), norm=norm, wide=wide))
    whole = random_batch(Model.inputs(small_schema(), Config()), 9, rng_for(2, "rows"))
    user, item = (dataclasses.replace(whole, dense=whole.dense[:, at : at + 1]) for at in (0, 1))
    rows = torch.arange(9)
    crosses = {"user_x_author": whole.sparse["user_x_author"].values()}
    joined = model.join(model.parts(user, False), model.parts(item, True), rows, rows, crosses)
    torch.testing.assert_close(joined, model(whole))


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="no id feature to embed"):
        Model.inputs(small_schema(), Config(features=("age",)))
    with pytest.raises(ConfigError, match="wide feature 'age' is numeric"):
        Model.inputs(small_schema(), Config(wide=("age",)))
    with pytest.raises(ConfigError, match="did you mean 'author'"):
        Model.inputs(small_schema(), Config(wide=("athor",)))
    with pytest.raises(ConfigError, match="multiple of 4"):
        Config.parse({"embedding_dim": 6})
