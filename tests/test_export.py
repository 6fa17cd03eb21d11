"""Export: what goes into a bundle, computed again by other means; what does not go together is refused."""

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from recsys_dist import card
from recsys_dist.bundle import Bundle
from recsys_dist.config import rng_for
from recsys_dist.data.collate import collate
from recsys_dist.data.examples import STATE, World, features, sort_events
from recsys_dist.data.prepared import MANIFEST, Prepared
from recsys_dist.errors import BundleError, CheckpointError, DataError
from recsys_dist.evaluate import EvaluateConfig, evaluate_bundle, load_trained
from recsys_dist.export import export
from recsys_dist.index import Exact, IndexConfig, Ivf
from recsys_dist.manifest import Manifest
from tests import bundles
from tests.conftest import Pair
from tests.data import small_log


@pytest.fixture(scope="module")
def log() -> pa.Table:
    return sort_events(small_log.events())


def test_serving_sees_of_each_user_what_the_whole_log_shows(bundle: Bundle, log: pa.Table) -> None:
    """Features of a later request are the same from the bundle's events and from every event there was."""
    users = pc.unique(log["user_id"])
    later = pc.max(log["timestamp"]).cast(pa.int64()).as_py() + 3_600_000_000
    request = pa.table(
        {
            "user_id": users,
            "item_id": small_log.items()["item_id"].take(pa.array(np.arange(len(users)))),
            "timestamp": pa.array(np.full(len(users), later), pa.timestamp("us", "UTC")),
            "device": pa.array(["tv"] * len(users)),
            STATE: pa.array(np.ones(len(users), bool)),
        }
    )
    world = World(bundle.encoders, bundle.users, bundle.items)
    found = []
    for events in (log.drop_columns(["watch_ms"]), bundle.events.drop_columns(["watch_ms"])):
        both = sort_events(pa.concat_tables([events, request], promote_options="default"))
        asked = np.flatnonzero(np.asarray(pc.fill_null(both[STATE], False)))
        found.append(pa.table(features(both, world, asked)))
    assert found[0].equals(found[1])
    assert max(map(len, found[0]["clicked"].to_pylist())) == 3, "the longest history that a feature sees"
    assert len(bundle.events) < 0.5 * len(log)
    assert bundle.events.equals(sort_events(bundle.events))


def test_seen_items_of_each_user(bundle: Bundle, log: pa.Table) -> None:
    rows = {item: row for row, item in enumerate(bundle.item_ids.to_pylist(), 1)}
    expected = defaultdict(set)
    for event in log.to_pylist():
        if event["item_id"] in rows:
            expected[event["user_id"]].add(rows[event["item_id"]])
    found = {row["user_id"]: row["items"] for row in bundle.seen.to_pylist()}
    assert found == {user: sorted(items) for user, items in expected.items()}


def test_popularity_counts_what_was_wanted_before_the_test_days(bundle: Bundle, log: pa.Table) -> None:
    rows = {item: row for row, item in enumerate(bundle.item_ids.to_pylist(), 1)}
    expected = np.zeros(len(rows) + 1, np.int64)
    for event in log.to_pylist():
        before = event["date"] < bundles.SPLIT.test_from and not event["history"]
        if before and (event["click"] or event["like"]) and event["item_id"] in rows:
            expected[rows[event["item_id"]]] += 1
    np.testing.assert_array_equal(bundle.positives, expected)


def test_the_manifest_says_where_it_comes_from(bundle: Bundle, pair: Pair) -> None:
    facts: Manifest = bundle.manifest
    assert facts.data.test_from == "2024-03-08" and facts.data.source == "small"
    assert str(facts.data.first_event).startswith("2024-03-02")
    assert facts.labels == {"ranking": ("click",), "recall": ("click", "like")}
    for scorer in ("model", "popularity"):
        ranked, recalled = (facts.metrics[task][scorer] for task in ("ranking", "recall"))
        assert ranked == {name: pair.evaluations["ranking"][scorer][name] for name in ranked}
        assert recalled == {name: pair.evaluations["recall"][scorer]["unseen"][name] for name in recalled}
    assert {"auc", "gauc"} <= set(facts.metrics["ranking"]["model"])
    assert {"recall@100", "ndcg@100"} <= set(facts.metrics["recall"]["popularity"])
    written = (bundle.path / "MODEL_CARD.md").read_text()
    assert facts.version in written and f"{facts.metrics['ranking']['model']['auc']:.4f}" in written
    assert "by the\npredicted probability of `click`.\n" in written
    assert "by the\nexpected `watch_ms`.\n" in card.text(facts, "watch_ms", calibrated=False)
    days = "from 2024-03-07 on, before 2024-03-08"
    assert f"`click`, calibrated on the days {days}.\n" in card.text(facts, None, calibrated=True)
    assert facts.index.recall_at_200 == 1 and isinstance(bundle.index, Exact)


@pytest.mark.ranks
def test_checkpoints_of_any_worker_count_give_the_same_bundle(
    bundle: Bundle, pair: Pair, tmp_path: Path
) -> None:
    sharded = bundles.resave(pair.prepared, pair.checkpoints, tmp_path, workers=3)
    assert len(list(sharded["ranking"].glob("*.distcp"))) >= 3
    again = export(pair.prepared, sharded, pair.evaluations, tmp_path / "bundles")
    assert again.manifest.version == bundle.manifest.version
    for file in bundle.path.rglob("*.safetensors"):
        assert (again.path / file.name).read_bytes() == file.read_bytes()


def test_only_attributes_that_features_read_and_titles_are_kept(pair: Pair, tmp_path: Path) -> None:
    data = Path(shutil.copytree(pair.prepared.path, tmp_path / "data"))
    for name in ("users", "items"):
        table = pq.read_table(data / f"entities/{name}.parquet")
        for column in ("title", "secret"):
            table = table.append_column(column, pa.array([f"{column} {n}" for n in range(len(table))]))
        pq.write_table(table, data / f"entities/{name}.parquet")
    made = export(Prepared.open(data), pair.checkpoints, pair.evaluations, tmp_path / "bundles")
    assert made.users.attributes.column_names == ["user_id", "age"]
    assert made.items.attributes.column_names == ["item_id", "genre", "length", "title"]


def test_a_large_catalogue_gets_lists_and_their_recall_is_measured(pair: Pair, tmp_path: Path) -> None:
    cfg = IndexConfig(exact_rows=5)
    made = export(pair.prepared, pair.checkpoints, pair.evaluations, tmp_path, cfg=cfg)
    opened = Bundle.open(made.path)
    assert isinstance(opened.index, Ivf) and opened.manifest.index.kind == "ivf"
    assert opened.manifest.index.recall_at_200 >= 0.99
    queries = rng_for(0, "queries").normal(size=(5, opened.item_vectors.shape[1])).astype(np.float32)
    opened.index.inverted.nprobe = opened.index.inverted.nlist
    found, expected = opened.index.search(queries, 9)[0], Exact(opened.item_vectors).search(queries, 9)[0]
    np.testing.assert_array_equal(found, expected)


def test_an_item_tower_is_exported_as_its_vectors(pair: Pair, tmp_path: Path) -> None:
    """From the catalogue in the checkpoint; the bundle serves the user tower without the items' tables."""
    tower = {"name": "two_tower", "embedding_dim": 8, "side_dim": 4, "hidden": [16], "output_dim": 8}
    checkpoints = {
        **pair.checkpoints,
        **bundles.train(pair.prepared, tmp_path / "trained", {"recall": tower}),
    }
    opened = Bundle.open(export(pair.prepared, checkpoints, pair.evaluations, tmp_path / "bundles").path)
    world = World(opened.encoders, opened.users, opened.items)
    at = world.items.positions(opened.item_ids)
    model: Any = load_trained(checkpoints["recall"], pair.prepared).model
    assert model.item_names == ["item", "genre", "length"] and model.item_dense_FI.shape[0] == 1
    for name, values in zip(model.item_names, model.item_ids_FI.numpy(), strict=True):
        np.testing.assert_array_equal(values, np.r_[0, world.item_inputs[name][at]])
    np.testing.assert_array_equal(model.item_dense_FI[0, 1:], world.item_inputs["watch_capacity"][at])
    np.testing.assert_array_equal(opened.item_vectors, model.item_vectors().detach())
    users = pq.read_table(pair.prepared.files("users/test")[0])
    batch = collate(users, opened.recall.schema)
    assert torch.equal(opened.recall.model(batch), model(batch))
    assert not any("item_tables" in name for name in opened.recall.model.state_dict())


def test_what_does_not_go_together_is_refused(pair: Pair, tmp_path: Path) -> None:
    def message(checkpoints: dict[str, Path] | None = None, **changes: Any) -> str:
        data = Path(shutil.copytree(pair.prepared.path, tmp_path / "data", dirs_exist_ok=True))
        manifest = pair.prepared.manifest
        (data / MANIFEST).write_text(
            type(manifest).parse({**manifest.model_dump(), **changes}).model_dump_json()
        )
        with pytest.raises((BundleError, CheckpointError)) as error:
            export(
                Prepared.open(data), checkpoints or pair.checkpoints, pair.evaluations, tmp_path / "bundles"
            )
        assert not (tmp_path / "bundles").exists() or not list((tmp_path / "bundles").glob("[!.]*"))
        return str(error.value)

    swapped = {"recall": pair.checkpoints["ranking"], "ranking": pair.checkpoints["recall"]}
    assert "is a ranking model (wide_deep), not a recall model" in message(swapped)
    assert "its data digest is" in message(fingerprint="other rows")
    assert "its vocabulary digest is" in message(vocabulary_digest="other ids")
    grown = {feature.name: 99 for feature in pair.prepared.schema.ids}
    other = pair.prepared.schema.fitted(grown)
    assert "the checkpoint was made for another schema" in message(fitted_schema=other.model_dump())
    torn = Path(shutil.copytree(pair.checkpoints["recall"], tmp_path / "torn"))
    next(torn.glob("*.distcp")).unlink()
    assert "is missing, of" in message({**pair.checkpoints, "recall": torn})


def test_figures_of_validation_days_are_refused(pair: Pair, tmp_path: Path) -> None:
    found = {**pair.evaluations, "recall": {**pair.evaluations["recall"], "split": "valid"}}
    with pytest.raises(BundleError, match="the recall model was evaluated on split 'valid'"):
        export(pair.prepared, pair.checkpoints, found, tmp_path)


def test_a_bundle_is_measured_on_other_data_as_on_its_own(bundle: Bundle, pair: Pair) -> None:
    """The champion's figures from the log and its own encoders are those from its training shards."""
    found = evaluate_bundle(bundle, pair.prepared, EvaluateConfig())
    for task in ("ranking", "recall"):
        told = bundle.manifest.metrics[task]["model"]
        assert {name: found[task]["model"][name] for name in told} == pytest.approx(told, rel=1e-6)


def test_a_bundle_is_measured_on_days_that_it_does_not_know(bundle: Bundle, tmp_path: Path) -> None:
    """Another log with new users and items, and days later: it answers for all of them."""
    log = small_log.events(seed=1)
    strangers = [f"new-{user}" if user == "u3" else user for user in log["user_id"].to_pylist()]
    log = log.set_column(0, "user_id", pa.array(strangers))
    later = bundles.prepare(tmp_path, log)
    found = evaluate_bundle(bundle, later, EvaluateConfig())
    assert found["ranking"]["model"]["rows"] == later.shards("ranking/test").total_rows
    assert found["recall"]["model"]["users"] == later.shards("users/test").total_rows
    with pytest.raises(DataError, match="has no 'device', which the bundle reads"):
        for file in later.path.glob("events/*/*.parquet"):
            pq.write_table(pq.read_table(file, partitioning=None).drop_columns(["device"]), file)
        evaluate_bundle(bundle, later, EvaluateConfig())
