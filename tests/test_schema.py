from typing import Any

import pytest
from torch import nn

from recsys_dist.errors import ConfigError
from recsys_dist.feature_kinds import Categorical, Sequence, side
from recsys_dist.schema import _NOT_TABLES, Schema

VALUES: dict[str, Any] = {
    "features": [
        {"kind": "categorical", "name": "user", "column": "user_id", "min_count": 2},
        {"kind": "categorical", "name": "video", "column": "item_id"},
        {"kind": "categorical", "name": "author", "column": "items.author_id"},
        {"kind": "bucketed", "name": "length", "column": "items.length_ms"},
        {"kind": "time", "name": "hour", "part": "hour"},
        {"kind": "cross", "name": "user_hour", "of": ["user", "hour"], "hash_buckets": 50},
        {"kind": "sequence", "name": "watched", "of": "video", "where": "click", "max_length": 5},
        {"kind": "numeric", "name": "age", "column": "users.age"},
        {"kind": "statistic", "name": "video_rate", "key": "item_id", "label": "click"},
    ],
    "labels": [{"name": "click"}, {"name": "watch_ms", "kind": "value"}],
    "ranking_label": "click",
    "recall_positive": ["click"],
}


def schema(**changes: Any) -> Schema:
    return Schema.parse({**VALUES, **changes})


def with_feature(**feature: Any) -> Schema:
    return schema(features=[*VALUES["features"], feature])


def test_features_fall_into_ids_and_dense_in_schema_order() -> None:
    ids = [feature.name for feature in schema().ids]
    assert ids == ["user", "video", "author", "length", "hour", "user_hour", "watched"]
    assert [feature.name for feature in schema().singles] == ids[:-1]
    assert [feature.name for feature in schema().sequences] == ["watched"]
    assert [feature.name for feature in schema().crosses] == ["user_hour"]
    assert [feature.name for feature in schema().dense] == ["age", "video_rate"]
    assert schema().item_id.name == "video"


def test_a_sequence_looks_up_the_table_of_its_items() -> None:
    built = schema()
    assert [built.table(feature) for feature in built.ids][-1] == "video"
    fitted = built.fitted({"user": 3, "video": 9, "author": 4, "length": 21, "hour": 25, "user_hour": 50})
    watched, video = fitted["watched"], fitted["video"]
    assert isinstance(watched, Sequence) and isinstance(video, Categorical)
    assert watched.rows == video.rows == 9
    assert built["video"] == Categorical(name="video", column="item_id")  # the original is untouched


def test_sides() -> None:
    built = schema()
    sides = {feature.name: built.sides(feature) for feature in built.features}
    assert sides["user"] == sides["watched"] == sides["age"] == {"user"}
    assert sides["video"] == sides["length"] == sides["video_rate"] == {"item"}
    assert sides["hour"] == {"context"}
    assert sides["user_hour"] == {"user", "context"}
    assert [side(column) for column in ("tab", "users.age", "items.x", "user_id")] == [
        "context", "user", "item", "user",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        ({"kind": "sequence", "name": "s", "of": "vidoe"}, "no feature 'vidoe'; did you mean 'video'"),
        (
            {"kind": "sequence", "name": "s", "of": "video", "where": "clik"},
            "no label 'clik'; did you mean 'click'",
        ),
        ({"kind": "sequence", "name": "s", "of": "user"}, "'user' is not an id feature of the item"),
        ({"kind": "sequence", "name": "s", "of": "age"}, "'age' is not an id feature of the item"),
        (
            {"kind": "cross", "name": "c", "of": ["video", "watched"]},
            "'watched' is sequence, not one id per row",
        ),
        (
            {"kind": "searches", "name": "s", "column": "items.title"},
            "searches 's': 'items.title' is not a column of the event itself",
        ),
        ({"kind": "searches", "name": "s", "column": "timestamp"}, "reads 'timestamp', which is not known"),
        ({"kind": "cross", "name": "c", "of": ["video"]}, "at least 2 items"),
        ({"kind": "cross", "name": "c", "of": ["video", "age"]}, "'age' is numeric"),
        ({"kind": "statistic", "name": "s", "key": "item_id", "label": "like"}, "no label 'like'"),
        (
            {"kind": "statistic", "name": "s", "key": "item_id", "label": "watch_ms"},
            r"label 'watch_ms' is an amount, which has no rate; take a binary one \(click\)",
        ),
        ({"kind": "numeric", "name": "user", "column": "x"}, "name 'user' is used twice"),
        ({"kind": "numeric", "name": "click", "column": "x"}, "name 'click' is used twice"),
        ({"kind": "numeric", "name": "Bad Name", "column": "x"}, "should match pattern"),
        ({"kind": "numerical", "name": "n", "column": "x"}, "'numeric'"),
        ({"kind": "categorical", "name": "n", "colunm": "x"}, "did you mean 'column'"),
        (
            {"kind": "categorical", "name": "n", "column": "x", "hash_buckets": 8, "max_rows": 4},
            "feature 'n': max_rows is of a vocabulary, and hash_buckets keeps none",
        ),
        ({"kind": "categorical", "name": "n", "column": "click"}, "reads 'click', which is not known when"),
        ({"kind": "statistic", "name": "n", "key": "click"}, "reads 'click', which is not known when"),
        ({"kind": "numeric", "name": "n", "column": "timestamp"}, "reads 'timestamp', which is not known"),
        (
            {"kind": "categorical", "name": "n", "column": "history"},
            "'history' is a column of the log itself",
        ),
        (
            {"kind": "categorical", "name": "n", "column": "item_id", "hash_buckets": 8},
            "feature 'n': items are recommended by the rows of their own id; leave out hash_buckets=8",
        ),
    ],
)
def test_a_wrong_feature_is_named_with_the_way_out(feature: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        with_feature(**feature)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranking_label": "watch_ms"}, "label 'watch_ms' is not a binary label.*click"),
        ({"recall_positive": ["clicks"]}, "did you mean 'click'"),
        ({"recall_positive": []}, "recall_positive"),
        ({"labels": [{"name": "row"}], "ranking_label": "row"}, "'row' is a column of the log itself"),
    ],
)
def test_a_wrong_label_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        schema(**changes)


def test_searches_and_numbers_do_not_share_a_column() -> None:
    both = [{"kind": kind, "name": kind, "column": "found"} for kind in ("numeric", "searches")]
    with pytest.raises(ConfigError, match="another feature reads numbers from column 'found'"):
        schema(features=[*VALUES["features"], *both])


def test_digest_follows_meaning() -> None:
    assert schema().digest() == schema().digest()
    assert schema(utc_offset_hours=8).digest() != schema().digest()
    rows = {"user": 3, "video": 9, "author": 4, "length": 21, "hour": 25, "user_hour": 50}
    assert schema().fitted(rows).digest() != schema().digest()
    assert schema().digest() == "dc40c94d99d1cb37", "runs and data of former versions stay what they are"
    limited = with_feature(kind="categorical", name="n", column="x", max_rows=9)
    assert limited.digest() != with_feature(kind="categorical", name="n", column="x").digest()
    assert Schema.parse(limited.model_dump(mode="json")) == limited


def test_select_keeps_order_and_refuses_what_would_dangle() -> None:
    kept = schema().select(["watched", "video", "user"])
    assert [feature.name for feature in kept.features] == ["user", "video", "watched"]
    with pytest.raises(ConfigError, match="no feature 'vide'; did you mean 'video'"):
        schema().select(["vide"])
    with pytest.raises(ConfigError, match="'watched': no feature 'video'"):
        schema().select(["watched"])


def test_recall_needs_an_item_id() -> None:
    without = schema(features=[f for f in VALUES["features"] if f["name"] not in ("video", "watched")])
    with pytest.raises(ConfigError, match="no categorical feature over column 'item_id'"):
        _ = without.item_id


def test_yaml_round_trip() -> None:
    assert Schema.parse(schema().model_dump(mode="json")) == schema()


def test_names_that_pytorch_has_itself_are_no_tables() -> None:
    taken = {name for name in dir(nn.ModuleDict()) if name.isalpha() and name.islower()}
    assert taken <= _NOT_TABLES
    for name in ("type", "wide"):
        with pytest.raises(ConfigError, match=f"feature '{name}': tables cannot have this name"):
            with_feature(kind="categorical", name=name, column="items.author_id")
    with_feature(kind="numeric", name="type", column="items.length_ms")
