"""Training and serving agree: every feature of every logged row, and its score, to 1e-5."""

import asyncio
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from recsys_dist.bundle import Bundle
from recsys_dist.data import stages
from recsys_dist.data.collate import collate
from recsys_dist.data.logs import LogSpec
from recsys_dist.serve.api import RankRequest, RecallRequest
from recsys_dist.serve.features import Features
from recsys_dist.serve.recommend import Recommender
from tests.conftest import Pair


@pytest.fixture(scope="module")
def logged(pair: Pair) -> pa.Table:
    """The rows of the test days, as training would have read them."""
    return pa.concat_tables(pq.read_table(file) for file in pair.prepared.files("ranking/test"))


def asked(logged: pa.Table, events: pa.Table, context: dict[str, bool]) -> pa.Table:
    """What a request would have said for each logged row."""
    keys = ["user_id", "item_id", "timestamp"]
    own = events.filter(pc.invert(events["history"])).select([*keys, *context])
    joined = logged.select(keys).append_column("at", pa.array(np.arange(len(logged)))).join(own, keys)
    return joined.sort_by("at").select(["user_id", "timestamp", *context])


def test_every_feature_of_every_logged_row(pair: Pair, bundle: Bundle, logged: pa.Table) -> None:
    schema = bundle.encoders.schema
    events = stages.read_bucket(pair.prepared.path, 0)
    features = Features.of(bundle, bundle.recall, bundle.ranking)
    context = LogSpec.from_schema(schema).context
    users = features.users(events, asked(logged, events, context))
    rows = features.rows(users, np.arange(len(logged)), bundle.items.positions(logged["item_id"]))
    assert len(rows) == len(logged) > 50
    assert set(rows.column_names) >= {feature.name for feature in bundle.ranking.schema.features}
    for name in rows.column_names:
        expected, found = logged[name].to_pylist(), rows[name].to_pylist()
        assert found == expected, name


def test_the_served_score_is_the_evaluated_one(pair: Pair, bundle: Bundle, logged: pa.Table) -> None:
    with torch.no_grad():
        logits = bundle.ranking.model(collate(logged, bundle.ranking.schema))
    expected = torch.sigmoid(logits).numpy()
    events = stages.read_bucket(pair.prepared.path, 0)
    recommender = Recommender(replace(bundle, events=events))  # a bundle's own are each user's newest few
    context = LogSpec.from_schema(bundle.encoders.schema).context
    requests = [
        RankRequest(
            user_id=row["user_id"],
            items=[item],
            timestamp=row["timestamp"],
            context={name: row[name] for name in context if row[name] is not None},
        )
        for row, item in zip(
            asked(logged, events, context).to_pylist(), logged["item_id"].to_pylist(), strict=True
        )
    ]
    answers = asyncio.run(recommender.rank(requests, budget_ms=60_000))
    found = [answer.items[0].probability for answer in answers]
    assert np.abs(np.array(found) - expected).max() < 1e-5


def test_an_evicted_item_is_ranked_as_unknown_and_never_recalled(
    pair: Pair, bundle: Bundle, logged: pa.Table
) -> None:
    evicted = set(pc.unique(stages.read_bucket(pair.prepared.path, 0)["item_id"]).to_pylist()) - set(
        bundle.item_ids.to_pylist()
    )
    assert pair.prepared.manifest.admissions["item"].old and pair.prepared.manifest.admissions["item"].beyond
    rows = logged.filter(pc.is_in(logged["item_id"], pa.array(sorted(evicted))))
    assert len(rows) and set(rows["item"].to_pylist()) == {0}, "what it is worth: the tests above"
    recommender = Recommender(replace(bundle, events=stages.read_bucket(pair.prepared.path, 0)))
    request = RecallRequest(user_id="u1", include_seen=True)
    [answer] = asyncio.run(recommender.recall([request], budget_ms=60_000))
    assert {item.item_id for item in answer.items} == set(bundle.item_ids.to_pylist())


def test_recall_finds_what_the_whole_catalogue_would_give(pair: Pair, bundle: Bundle) -> None:
    users = pa.concat_tables(pq.read_table(file) for file in pair.prepared.files("users/test"))
    with torch.no_grad():
        vectors = bundle.recall.model(collate(users, bundle.recall.schema)).numpy()
    scores = vectors @ bundle.item_vectors.T
    recommender = Recommender(replace(bundle, events=stages.read_bucket(pair.prepared.path, 0)))
    requests = [
        RecallRequest(user_id=row["user_id"], timestamp=row["timestamp"], k=5, include_seen=True)
        for row in users.select(["user_id", "timestamp"]).to_pylist()
    ]
    answers = asyncio.run(recommender.recall(requests, budget_ms=60_000))
    for answer, row in zip(answers, scores, strict=True):
        best = np.sort(row[1:])[::-1][:5]
        np.testing.assert_allclose([item.recall_score for item in answer.items], best, atol=1e-5)
