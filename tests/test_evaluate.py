"""Evaluations of a small prepared data set made by hand, against brute force over the same files."""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import scipy.sparse as sp
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from jobs.evaluate import parse, ranking_table, recall_table
from jobs.tracked import add_evaluation
from recsys_dist import session
from recsys_dist.batch import Batch
from recsys_dist.config import rng_for
from recsys_dist.data.prepared import Manifest, Prepared
from recsys_dist.errors import ConfigError, DataError
from recsys_dist.evaluate import EvaluateConfig, Trained, evaluate_ranking, evaluate_recall, write_json
from recsys_dist.outbox import Recorder
from recsys_dist.schema import Schema
from recsys_dist.tracking import TrackingConfig, open_run
from recsys_dist.train.item_cosine import similarity

USERS, ITEMS = 25, 15  # of which user 0 and item 0 are unknown
CFG = EvaluateConfig(batch_rows=16, ks=(1, 3, 10), bootstrap=20, item_pairs=0)

SCHEMA = Schema.parse(
    {
        "features": [
            {"kind": "categorical", "name": "user", "column": "user_id"},
            {"kind": "categorical", "name": "item", "column": "item_id"},
            {"kind": "sequence", "name": "watched", "of": "item", "max_length": 4},
            {"kind": "numeric", "name": "age", "column": "users.age"},
        ],
        "labels": [{"name": "click"}],
        "ranking_label": "click",
        "recall_positive": ["click"],
    }
).fitted({"user": USERS, "item": ITEMS})


class ByAge(nn.Module):
    """A ranker whose logit is the only float."""

    predicts = None

    def forward(self, batch: Batch) -> torch.Tensor:
        return batch.dense[:, 0]

    def prediction(self, logit: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(logit)


class Expecting(ByAge):
    """Its logit is the logarithm of what it expects."""

    predicts = "click"

    def prediction(self, logit: torch.Tensor) -> torch.Tensor:
        return logit.exp()


class ByTable(nn.Module):
    """A recall model that scores item i for user u with taste[u, i]."""

    def __init__(self, taste: np.ndarray) -> None:
        super().__init__()
        self.taste = torch.tensor(taste, dtype=torch.float32)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.taste[batch.sparse["user"].values().long()]

    def item_vectors(self) -> torch.Tensor:
        return torch.eye(ITEMS)


def examples(split: str, rows: int) -> pa.Table:
    rng = rng_for(0, split)
    user, item = rng.integers(0, USERS, rows), rng.integers(0, ITEMS, rows)
    p = rng.uniform(0.05, 0.95, rows)
    return pa.table(
        {
            "user": pa.array(user, pa.int32()),
            "item": pa.array(item, pa.int32()),
            "watched": pa.array([rng.integers(1, ITEMS, n).tolist() for n in user % 4], pa.list_(pa.int32())),
            "age": pa.array(np.round(rng.normal(size=rows), 1), pa.float32()),
            "click": pa.array(rng.random(rows) < p).cast(pa.int8()).cast(pa.float32()),
            "bayes_probability": pa.array(p, pa.float32()),
            "user_id": [f"u{u}" for u in user],
            "item_id": [f"i{i}" for i in item],
            "row_id": pa.array(np.arange(rows)),
        }
    )


def states(split: str) -> pa.Table:
    rng = rng_for(0, "states", split)
    lists = [[rng.choice(ITEMS, n, replace=False).tolist() for n in rng.integers(1, 5, 20)] for _ in range(2)]
    return pa.table(
        {
            **{name: examples(split, 20)[name] for name in ("watched", "age")},
            "user": pa.array(np.arange(1, 21), pa.int32()),
            "item": pa.array(np.zeros(20), pa.int32()),
            "user_id": [f"u{u}" for u in range(1, 21)],
            "truth": pa.array([[*wanted, 0] for wanted in lists[0]], pa.list_(pa.int32())),
            "seen": pa.array(lists[1], pa.list_(pa.int32())),
        }
    )


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    splits = {}
    for name, rows in (("train", 300), ("valid", 60), ("test", 100)):
        splits[f"ranking/{name}"] = write(tmp_path, f"ranking/{name}", examples(name, rows), parts=3)
    for name in ("valid", "test"):
        splits[f"users/{name}"] = write(tmp_path, f"users/{name}", states(name), parts=2)
    items = {"item_id": [f"i{i}" for i in range(1, ITEMS)], "row": range(1, ITEMS)}
    counts = {f"{s}_positives": rng_for(1, s).integers(0, 9, ITEMS - 1) for s in ("train", "valid")}
    pq.write_table(pa.table({**items, **counts}), tmp_path / "items.parquet")
    for day, bucket in ((1, 0), (1, 1), (2, 0), (9, 0)):
        shown = examples(f"events {day} {bucket}", 80).filter(pa.array(np.arange(80) % 3 != bucket))
        users = pa.array([f"{u}-{bucket}" for u in shown["user_id"].to_pylist()])
        file = tmp_path / f"events/date=2024-03-0{day}/bucket-{bucket:05d}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"user_id": users, "item_id": shown["item_id"]}), file)
    manifest = {
        "fingerprint": "f",
        "schema_digest": SCHEMA.digest(),
        "vocabulary_digest": "v",
        "fitted_schema": SCHEMA,
        "config": {"split": {"valid_from": "2024-03-08", "test_from": "2024-03-09"}},
        "splits": splits,
        "ledger": {},
    }
    return Prepared(tmp_path, Manifest.parse(manifest))


def write(root: Path, folder: str, table: pa.Table, parts: int) -> dict[str, list]:
    (root / folder).mkdir(parents=True)
    cuts = [len(table) * part // parts for part in range(parts + 1)]
    files = [f"{folder}/part-{part:05d}.parquet" for part in range(parts)]
    for file, (start, stop) in zip(files, pairwise(cuts), strict=True):
        pq.write_table(table.slice(start, stop - start), root / file)
    return {"files": files, "rows": np.diff(cuts).tolist()}


def reversed_map(work: Callable[[str], pa.Table], files: Iterable[str]) -> list[pa.Table]:
    return [work(file) for file in reversed(list(files))]


def test_ranking_beside_baselines_and_truth(prepared: Prepared) -> None:
    result = evaluate_ranking(prepared, Trained(ByAge(), SCHEMA), CFG)
    test, known = examples("test", 100), [examples("train", 300), examples("valid", 60)]
    y = test["click"].to_numpy()
    assert result["model"]["auc"] == pytest.approx(roc_auc_score(y, test["age"].to_numpy()))
    assert result["bayes"]["auc"] == pytest.approx(roc_auc_score(y, test["bayes_probability"].to_numpy()))
    seen = pa.concat_tables(known)
    clicks, logit = seen["click"].to_numpy(), lambda p: np.log(p / (1 - p))
    encoded = np.full(100, logit(clicks.mean()))
    for name in ("user", "item"):
        for row, value in enumerate(test[name].to_numpy()):
            mine = clicks[seen[name].to_numpy() == value]
            encoded[row] += logit((mine.sum() + 20 * clicks.mean()) / (len(mine) + 20)) - logit(clicks.mean())
    assert result["target_encoding"]["auc"] == pytest.approx(roc_auc_score(y, encoded))
    expected = np.mean(np.logaddexp(0, encoded) - y * encoded)
    assert result["target_encoding"]["logloss"] == pytest.approx(expected)
    counts = np.r_[0, rng_for(1, "train").integers(0, 9, ITEMS - 1) + rng_for(1, "valid").integers(0, 9, 14)]
    popular = counts[test["item"].to_numpy()]
    assert result["popularity"]["auc"] == pytest.approx(roc_auc_score(y, popular))
    assert set(result["popularity"]) == {"auc", "gauc", "rows", "positives", "users", "intervals"}
    low, high = result["model_minus_target_encoding"]["auc"]
    assert low < result["model"]["auc"] - result["target_encoding"]["auc"] < high
    assert sum(result["reliability"]["rows"]) == 100


def test_an_expected_amount_stands_beside_each_items_mean(prepared: Prepared) -> None:
    result = evaluate_ranking(prepared, Trained(Expecting(), SCHEMA), CFG)
    test, known = examples("test", 100), pa.concat_tables([examples("train", 300), examples("valid", 60)])
    clicks, item = known["click"].to_numpy(), known["item"].to_numpy()
    means = [
        clicks[item == i].mean() if (item == i).any() else clicks.mean() for i in test["item"].to_numpy()
    ]
    y = test["click"].to_numpy()
    amount = result["amount"]
    assert amount["model"]["mae"] == pytest.approx(
        np.abs(np.exp(test["age"].to_numpy()) - y).mean(), rel=1e-6
    )
    assert amount["item_mean"]["mae"] == pytest.approx(np.abs(means - y).mean())
    assert amount["item_mean"]["xauc"] == pytest.approx(roc_auc_score(y, means))  # of two values: the AUC
    for scorer in ("model", "item_mean"):
        assert result[scorer].items() >= amount[scorer].items(), "what is tracked and exported, by scorer"
    assert "logloss" not in result["model"] and "reliability" not in result
    assert "expected click: mean absolute error" in ranking_table(result)


def test_result_does_not_depend_on_who_scores_which_file_when(prepared: Prepared) -> None:
    one = evaluate_ranking(prepared, Trained(ByAge(), SCHEMA), CFG)
    assert repr(evaluate_ranking(prepared, Trained(ByAge(), SCHEMA), CFG, None, reversed_map)) == repr(one)


def test_predictions_are_written_row_by_row(prepared: Prepared, tmp_path: Path) -> None:
    evaluate_ranking(prepared, Trained(ByAge(), SCHEMA), CFG, tmp_path / "out")
    files = sorted((tmp_path / "out/predictions").iterdir())
    written, test = pa.concat_tables(pq.read_table(file) for file in files), examples("test", 100)
    assert written["user_id"] == test["user_id"] and written["item_id"] == test["item_id"]
    assert written["label"] == test["click"]
    expected = 1 / (1 + np.exp(-test["age"].to_numpy().astype(float)))
    np.testing.assert_allclose(written["probability"].to_numpy(), expected, rtol=1e-6)


def test_validation_is_compared_with_what_training_days_knew(prepared: Prepared) -> None:
    result = evaluate_ranking(prepared, Trained(ByAge(), SCHEMA), CFG.override(["split=valid"]))
    valid = examples("valid", 60)
    counts = np.r_[0, rng_for(1, "train").integers(0, 9, ITEMS - 1)]
    expected = roc_auc_score(valid["click"].to_numpy(), counts[valid["item"].to_numpy()])
    assert result["popularity"]["auc"] == pytest.approx(expected)


def brute_recall(scores: np.ndarray, k: int, mask: bool) -> float:
    """Found pairs / wanted pairs by plain loops; `scores` [20, ITEMS]."""
    found = wanted = 0
    for user_scores, state in zip(scores, states("test").to_pylist(), strict=True):
        allowed = [i for i in range(1, ITEMS) if not (mask and i in state["seen"])]
        top = sorted(allowed, key=lambda i, of=user_scores: -of[i])[:k]
        found += len(set(top) & set(state["truth"]))
        wanted += len(state["truth"])
    return found / wanted


@pytest.mark.parametrize("k", [1, 3, 10])
def test_recall_beside_baselines(prepared: Prepared, k: int) -> None:
    taste = rng_for(2, "taste").normal(size=(USERS, ITEMS))
    result = evaluate_recall(prepared, Trained(ByTable(taste), SCHEMA), CFG)
    counts = np.r_[0, rng_for(1, "train").integers(0, 9, ITEMS - 1) + rng_for(1, "valid").integers(0, 9, 14)]
    popular = np.tile(counts - np.arange(ITEMS) / 100, (20, 1))
    for variant, mask in (("unseen", True), ("all", False)):
        recall = result["model"][variant][f"recall@{k}"]
        assert recall == pytest.approx(brute_recall(taste[1:21], k, mask))
        recall = result["popularity"][variant][f"recall@{k}"]
        assert recall == pytest.approx(brute_recall(popular, k, mask))
    assert result["users"] == 20 and result["skipped"] == {"item_cosine": "item_pairs=0 for 15 items"}
    low, high = result["model_minus_popularity"][f"recall@{k}"]
    model, popularity = (result[name]["unseen"][f"recall@{k}"] for name in ("model", "popularity"))
    assert low <= model - popularity <= high


@pytest.fixture
def cluster() -> Iterator[None]:
    session.connect(cpus=2)
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_item_cosine_uses_the_exposures_before_the_split(prepared: Prepared) -> None:
    shown = np.zeros((200, ITEMS))
    codes: dict[str, int] = {}
    for day, bucket in ((1, 0), (1, 1), (2, 0)):  # day 9 is a test day
        events = pq.read_table(
            prepared.path / f"events/date=2024-03-0{day}/bucket-{bucket:05d}.parquet", partitioning=None
        )
        for user, item in zip(*[events[c].to_pylist() for c in ("user_id", "item_id")], strict=True):
            shown[codes.setdefault(user, len(codes)), int(item[1:])] = 1
    shown[:, 0] = 0
    users = np.maximum(shown.sum(axis=0), 1)
    cosine = shown.T @ shown / np.sqrt(np.outer(users, users))
    np.fill_diagonal(cosine, 0)
    scores = np.array([cosine[seen].sum(axis=0) for seen in states("test")["seen"].to_pylist()])
    few = similarity(prepared, "test", most=3)
    assert sp.issparse(few)
    strongest = np.argsort(-cosine, axis=0, kind="stable")[:3]
    expected = np.zeros_like(cosine)
    np.put_along_axis(expected, strongest, np.take_along_axis(cosine, strongest, 0), 0)
    np.testing.assert_allclose(few.toarray(), expected, rtol=1e-6)
    cfg = CFG.override([f"item_pairs={ITEMS * ITEMS}"])
    result = evaluate_recall(prepared, Trained(ByTable(np.zeros((USERS, ITEMS))), SCHEMA), cfg)
    assert result["skipped"] == {}
    for k in (1, 3):
        assert result["item_cosine"]["unseen"][f"recall@{k}"] == pytest.approx(brute_recall(scores, k, True))


def test_lists_longer_than_the_catalogue_end_in_nothing(prepared: Prepared) -> None:
    cfg = CFG.override(["ks=[40]"])
    result = evaluate_recall(prepared, Trained(ByTable(np.ones((USERS, ITEMS))), SCHEMA), cfg)
    wanted = states("test")["truth"].to_pylist()
    reachable = sum(len(set(truth) - {0}) for truth in wanted) / sum(map(len, wanted))
    assert result["model"]["all"]["recall@40"] == pytest.approx(reachable)


def test_no_user_wanting_anything_is_an_error(prepared: Prepared) -> None:
    for file in prepared.files("users/test"):
        pq.write_table(states("test").slice(0, 0), file)
    with pytest.raises(DataError, match="no user wanted an item in split 'test'"):
        evaluate_recall(prepared, Trained(ByTable(np.zeros((USERS, ITEMS))), SCHEMA), CFG)


def test_json_has_no_nan(tmp_path: Path) -> None:
    write_json({"a": float("nan"), "b": [(1.0, float("nan"))]}, tmp_path / "x/result.json")
    assert json.loads((tmp_path / "x/result.json").read_text()) == {"a": None, "b": [[1.0, None]]}


def test_tables_show_every_scorer(prepared: Prepared) -> None:
    table = ranking_table(evaluate_ranking(prepared, Trained(ByAge(), SCHEMA), CFG))
    for shown in ("click on test days: 100 exposures", "model", "target encoding", "best reachable", "AUC"):
        assert shown in table
    taste = np.zeros((USERS, ITEMS))
    table = recall_table(evaluate_recall(prepared, Trained(ByTable(taste), SCHEMA), CFG), CFG.ks)
    for shown in (
        "20 users",
        "recall@10",
        "popularity",
        "item-to-item cosine skipped: item_pairs=0 for 15 items",
        "all items",
    ):
        assert shown in table


def test_command_line_settings_may_follow_options() -> None:
    cfg, args = parse(["checkpoint", "--data", "prepared", "split=valid", "ks=[20]"])
    assert (cfg.split, cfg.ks, args.checkpoint, args.data) == ("valid", (20,), "checkpoint", "prepared")


@pytest.mark.parametrize("settings", [{"ks": [0]}, {"ks": [-1, 50]}, {"encoded": []}])
def test_cuts_below_one_and_no_features_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        EvaluateConfig.parse(settings)


def test_an_evaluation_joins_the_run_that_trained_the_checkpoint(tmp_path: Path) -> None:
    with open_run(TrackingConfig(uri="http://127.0.0.1:1", request_timeout_s=1), tmp_path, "r"):
        pass
    evaluation = {"label": "click", "split": "test", "model": {"auc": 0.7, "intervals": {"auc": [0.6, 0.8]}}}
    delivery = add_evaluation(tmp_path / "models/r/refit/epoch-0001-ab12cd34", evaluation)
    assert delivery is not None and delivery.trouble  # nobody listens there: it waits in the run's outbox
    records = [record for record, _ in Recorder(tmp_path / "tracking/r").read()]
    assert [record["values"] for record in records if record["kind"] == "metrics"] == [
        {"test/model/auc": 0.7}
    ]
    assert records[-1]["kind"] == "metrics", "the run stays FINISHED"
    assert add_evaluation(tmp_path / "models/copied/refit/epoch-0001-ab12cd34", evaluation) is None
