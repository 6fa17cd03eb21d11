"""Starting from a former run: whose row is whose, what is taken with it, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from recsys_dist.config import rng_for
from recsys_dist.data.encoders import Encoders
from recsys_dist.data.prepared import MANIFEST, Manifest, Prepared, ShardSet
from recsys_dist.data.vocab import Vocabulary
from recsys_dist.errors import ConfigError
from recsys_dist.models.protocol import Catalogue
from recsys_dist.models.wide_deep import Config, Model
from recsys_dist.schema import Schema
from recsys_dist.train import checkpoint as checkpoints
from recsys_dist.train import saving, warm_start
from recsys_dist.train.loop import Loss, Workers
from recsys_dist.train.pieces import local
from recsys_dist.train.placement import ShardingConfig
from recsys_dist.train.pretrained import RESULT
from recsys_dist.train.settings import TrainConfig
from recsys_dist.train.sharding import ShardedModel, shard
from tests.train import tiny
from tests.train.ranks import run_ranks
from tests.train.test_sharding import ADAGRAD, ROWWISE
from tests.train.truth import whole

THEN = {"user": ["ann", "bob", "cyd"], "item": ["a", "b", "c", "d", "e"]}
NOW = {"user": ["dan", "cyd", "ann", "eve", "bob", "fay"], "item": ["e", "x", "a", "y", "c"]}
FORMER_ROW = {"user": [0, -1, 3, 1, -1, 2, -1], "item": [0, 5, -1, 1, -1, 3]}
MODEL = Config(embedding_dim=8, hidden=(16,))


def schema_of(values: dict[str, list[str]], age: bool = True) -> Schema:
    chosen = tiny.schema() if age else tiny.schema().select(["user", "item", "history", "length"])
    return chosen.fitted({name: len(known) + 1 for name, known in values.items()})


def make_data(path: Path, values: dict[str, list[str]], digest: str, age: bool = True) -> Prepared:
    """A prepared data set as far as this is about: its manifest and its vocabularies."""
    schema = schema_of(values, age)
    vocabularies = {name: Vocabulary(pa.array(known), np.ones(len(known))) for name, known in values.items()}
    Encoders(schema, vocabularies, {}, {}, {}, 0).save(path / "vocabulary")
    manifest = Manifest(
        fingerprint="f",
        schema_digest="s",
        vocabulary_digest=digest,
        fitted_schema=schema,
        config={},
        splits={"ranking/valid": ShardSet(files=(), rows=(1,))},
        ledger={},
    )
    (path / MANIFEST).write_text(manifest.model_dump_json())
    return Prepared.open(path)


def sharded_model(schema: Schema, seed: int, optimizer, placed: dict) -> ShardedModel:
    torch.manual_seed(seed)
    catalogue = Catalogue(torch.ones(schema.item_id.rows, dtype=torch.int64))
    loss = Loss(Model(MODEL, Model.inputs(schema, MODEL), catalogue))
    return shard(loss, loss.model.table_groups(), optimizer, ShardingConfig.parse(placed), seed)


def state(sharded: ShardedModel) -> dict[str, np.ndarray]:
    sums = {f"sums {name}": total for name, total in whole(sharded.accumulators()).items()}
    return {**whole(sharded.weights()), **sums}


def make_run(_rank: int, path: str, data: str, optimizer) -> dict[str, np.ndarray]:
    """A finished run whose weights and optimizer states are noise; returns them."""
    prepared, root = Prepared.open(data), Path(path)
    sharded = sharded_model(prepared.schema, 1, optimizer, {})
    tensors = {**sharded.weights(), **{f"sums {name}": s for name, s in sharded.accumulators().items()}}
    for name, value in tensors.items():
        for tensor, _ in local(value):
            tensor.data.copy_(torch.from_numpy(rng_for(2, name).normal(size=tuple(tensor.shape))))
    catalogue = Catalogue(torch.ones(prepared.schema.item_id.rows, dtype=torch.int64))
    manifest = checkpoints.Manifest(
        model=MODEL.model_dump(mode="json"),
        data_schema=prepared.schema,
        vocabulary_digest=prepared.manifest.vocabulary_digest,
        data_digest="d",
        seed=1,
        phase="choose",
        epoch=1,
        step=1,
        history=[{}],
    )
    saved = saving.save(root / "choose", sharded, catalogue, manifest, Workers())
    (root / RESULT).write_text(
        json.dumps({"checkpoint": str(saved.path.relative_to(root)), "chosen_epoch": 1})
    )
    (root / "config.yaml").write_text(f"data: {data}\n")
    return state(sharded)


def started(_rank: int, run: str, data: str, optimizer, placed: dict) -> tuple[dict, dict, list[str]]:
    prepared = Prepared.open(data)
    sharded = sharded_model(prepared.schema, 3, optimizer, placed)
    anew = state(sharded)
    told = warm_start.start(sharded, prepared.schema, prepared, run, "choose")
    return anew, state(sharded), told


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("world", "optimizer", "placed"),
    [
        (1, ROWWISE, {}),
        (2, ROWWISE, {"kind": "row_wise"}),
        (2, ADAGRAD, {"tables": {"user": "column_wise", "item": "row_wise"}}),
        (2, ROWWISE, {"tables": {"user": "data_parallel"}}),
    ],
)
def test_rows_go_with_what_they_stand_for(tmp_path, world, optimizer, placed):
    then = make_data(tmp_path / "then", THEN, "then")
    now = make_data(tmp_path / "now", NOW, "now")
    [former] = run_ranks(1, make_run, str(tmp_path / "run"), str(then.path), optimizer)
    rows = {name: np.array(found) for name, found in FORMER_ROW.items()}
    items = np.where(rows["item"] < 0, -1, rows["item"] + len(THEN["user"]) + 1)
    tables = {**rows, "wide": np.concatenate([rows["user"], items])}
    given = (str(tmp_path / "run"), str(now.path), optimizer, placed)
    for anew, found, told in run_ranks(world, started, *given):
        for name, value in found.items():
            table = name.split(".")[-2]
            taken = tables.get(table)
            if taken is None:
                expected = former[name]  # dense weights
            else:
                shape = (len(taken),) + (1,) * (value.ndim - 1)
                expected = np.where((taken < 0).reshape(shape), anew[name], former[name][taken])
            np.testing.assert_array_equal(value, expected, err_msg=name)
        assert "table 'user': 4 of 7 rows taken, 4 were there" in told
        assert "table 'wide': 8 of 13 rows taken, 10 were there" in told


@pytest.mark.ranks
def test_another_rule_takes_weights_and_starts_its_own_sums(tmp_path):
    then = make_data(tmp_path / "then", THEN, "then")
    [former] = run_ranks(1, make_run, str(tmp_path / "run"), str(then.path), ROWWISE)
    [(anew, found, _)] = run_ranks(1, started, str(tmp_path / "run"), str(then.path), ADAGRAD, {})
    for name, value in found.items():
        expected = anew if name.startswith("sums") else former
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.ranks
def test_a_feature_more_is_a_layer_anew(tmp_path):
    then = make_data(tmp_path / "then", THEN, "then", age=False)
    now = make_data(tmp_path / "now", THEN, "now")
    [former] = run_ranks(1, make_run, str(tmp_path / "run"), str(then.path), ROWWISE)
    [(anew, found, told)] = run_ranks(1, started, str(tmp_path / "run"), str(now.path), ROWWISE, {})
    first = "model.tower.layers.0.weight"
    assert former[first].shape != found[first].shape
    np.testing.assert_array_equal(found[first], anew[first])
    for name in found.keys() - {first}:
        np.testing.assert_array_equal(found[name], former[name], err_msg=name)
    assert told[-1].endswith("new: tower.layers.0.weight")


@pytest.mark.ranks
def test_what_cannot_be_started_from_is_refused(tmp_path):
    then = make_data(tmp_path / "then", THEN, "then")
    run_ranks(1, make_run, str(tmp_path / "run"), str(then.path), ROWWISE)
    cfg = TrainConfig.parse({"data": str(then.path), "model": MODEL, "warm_start": str(tmp_path / "run")})
    cfg.check(then)
    with pytest.raises(ConfigError, match=r"warm_start=.*is no finished run: it has no result\.json"):
        cfg.model_copy(update={"warm_start": str(tmp_path)}).check(then)
    with pytest.raises(ConfigError, match="both say what tables start from"):
        cfg.model_copy(update={"item_vectors": str(tmp_path)}).check(then)
    make_data(tmp_path / "then", NOW, "other")
    with pytest.raises(ConfigError, match="vocabulary there is other, the run's then"):
        cfg.check(then)
    (then.path / MANIFEST).unlink()
    with pytest.raises(ConfigError, match="whose rows are whose is in the data that it was trained on"):
        cfg.check(then)


def test_crosses_are_taken_where_values_of_their_parts_keep_their_rows(tmp_path):
    def with_cross(values: dict[str, list[str]], name: str) -> tuple[Schema, Prepared]:
        cross = {"kind": "cross", "name": "user_x_item", "of": ["user", "item"], "hash_buckets": 6}
        data = make_data(tmp_path / name, values, name)
        features = [*(f.model_dump() for f in data.schema.features), cross]
        schema = Schema.parse({**data.schema.model_dump(), "features": features})
        fitted = schema.fitted({**{n: len(v) + 1 for n, v in values.items()}, "user_x_item": 7})
        return fitted, replace(data, manifest=data.manifest.model_copy(update={"fitted_schema": fitted}))

    stretch = [("user_x_item", 0, 7)]
    alike = warm_start.row_map(stretch, stretch, with_cross(THEN, "a"), with_cross(THEN, "b"))
    np.testing.assert_array_equal(alike, np.arange(7))
    more = {"user": [*THEN["user"], "dan"], "item": ["x", *THEN["item"][1:4]]}  # rows kept: one new, one gone
    grown = warm_start.row_map(stretch, stretch, with_cross(more, "e"), with_cross(THEN, "f"))
    np.testing.assert_array_equal(grown, np.arange(7))
    words = with_cross(THEN, "w")
    feature = {"kind": "searches", "name": "user_x_item", "column": "query", "hash_buckets": 6, "rows": 7}
    features = [f if f.name != "user_x_item" else feature for f in words[0].features]
    words = Schema.parse({**words[0].model_dump(), "features": features}), words[1]
    anew = warm_start.row_map(stretch, stretch, words, with_cross(THEN, "x"))
    np.testing.assert_array_equal(anew, np.full(7, -1))  # as many rows, of something else
    other = warm_start.row_map(stretch, stretch, with_cross(NOW, "c"), with_cross(THEN, "d"))
    np.testing.assert_array_equal(other, np.full(7, -1))
