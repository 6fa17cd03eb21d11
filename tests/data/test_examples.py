"""Features against a row-by-row computation in plain Python, and blindness to the future."""

import datetime as dt
import itertools
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from recsys_dist.data import encoders as fitting
from recsys_dist.data import stages
from recsys_dist.data.counts import Counts
from recsys_dist.data.entities import Entities
from recsys_dist.data.examples import STATE, World, chunks, examples, features, sort_events, user_states
from recsys_dist.data.recent import recent
from recsys_dist.data.split import SPLITS, Split
from recsys_dist.data.transforms import hash_text, mix
from recsys_dist.feature_kinds import Statistic
from recsys_dist.schema import Schema
from tests.data.small_log import FIRST_DAY, SCHEMA, events, items, users

SPLIT = Split(valid_from=FIRST_DAY + dt.timedelta(days=5), test_from=FIRST_DAY + dt.timedelta(days=6))
FREEZE = (SPLIT.test_from - dt.date(1970, 1, 1)).days


def world_of(log: pa.Table, schema: Schema = SCHEMA) -> World:
    counts = Counts.of(log, schema, SPLIT)
    seen_users = counts.by_column["user_id"]["value"].unique()
    known_users = Entities.of(users(), "user_id", seen_users)
    known_items = Entities.of(items(), "item_id", counts.by_column["item_id"]["value"].unique())
    encoders, _ = fitting.fit(schema, counts, known_users, known_items, FREEZE)
    return World(encoders, known_users, known_items)


@pytest.fixture(scope="module")
def log() -> pa.Table:
    return sort_events(events())


@pytest.fixture(scope="module")
def world(log: pa.Table) -> World:
    return world_of(log)


def local_day(row: dict[str, Any]) -> int:
    return (row["timestamp"] + dt.timedelta(hours=8)).date().toordinal() - dt.date(1970, 1, 1).toordinal()


def row_of(world: World, feature: str, value: str | None) -> int:
    values = world.encoders.vocabularies[feature].values.to_pylist()
    return values.index(value) + 1 if value in values else 0


def log_odds(rate: float) -> float:
    return math.log(rate / (1 - rate))


def smoothed(past: list[dict[str, Any]], prior: float) -> float:
    known = [r["click"] for r in past if r["click"] is not None]
    return log_odds((sum(known) + 2 * prior) / (len(known) + 2)) - log_odds(prior)


def sessions_of(times: list[dt.datetime]) -> list[int]:
    """Back from the newest: 1, and one more, up to 3, wherever ten hours lie between two events."""
    numbers = [1] if times else []
    for later, earlier in itertools.pairwise(reversed(times)):
        numbers.append(min(3, numbers[-1] + (later - earlier > dt.timedelta(hours=10))))
    return numbers[::-1]


def searched(past: list[dict[str, Any]]) -> list[int]:
    """Buckets of words and pairs of the last two searches; one that goes on over several events is one."""
    texts = [r["query"].strip().lower() for r in past if re.search(r"\w", r["query"] or "")]
    texts = [text for text, before in zip(texts, [None, *texts], strict=False) if text != before]
    rows = []
    for text in texts[-2:]:
        words = re.findall(r"\w+", text.lower())
        hashed = [hash_text(pa.array([word])) for word in words]
        hashed += [mix(mix(one) ^ two) for one, two in itertools.pairwise(hashed)]
        rows += [1 + int(code[0] % np.uint64(64)) for code in hashed]
    return rows


def test_every_feature_equals_a_computation_row_by_row(log: pa.Table, world: World) -> None:
    rows = log.to_pylist()
    item_of = {r["item_id"]: r for r in items().to_pylist()}
    age_of = {r["user_id"]: r["age"] for r in users().to_pylist()}
    fitted = [r for r in rows if r["date"] < SPLIT.valid_from]
    clicks = [r["click"] for r in fitted if r["click"] is not None]
    prior = sum(clicks) / len(clicks)
    ages = [age_of[r["user_id"]] for r in fitted if r["user_id"] in age_of]
    got = {name: column.to_pylist() for name, column in features(log, world, np.arange(len(log))).items()}

    def genre(row: dict[str, Any]) -> str | None:
        return item_of.get(row["item_id"], {}).get("genre")

    for at, row in enumerate(rows):
        past = [r for r in rows if r["user_id"] == row["user_id"] and r["timestamp"] < row["timestamp"]]
        days = [r for r in rows if local_day(r) < min(local_day(row), FREEZE) and r["date"] < SPLIT.test_from]
        clicked = [r for r in past if r["click"]][-3:]
        want = {
            "user": row_of(world, "user", row["user_id"]),
            "item": row_of(world, "item", row["item_id"]),
            "genre": row_of(world, "genre", genre(row)),
            "hour": (row["timestamp"] + dt.timedelta(hours=8)).hour + 1,
            "weekday": (row["timestamp"] + dt.timedelta(hours=8)).isoweekday(),
            "clicked": [row_of(world, "item", r["item_id"]) for r in clicked],
            "clicked_genre": [row_of(world, "genre", genre(r)) for r in clicked],
            "shown": [row_of(world, "item", r["item_id"]) for r in past[-4:]],
            "shown_sessions": sessions_of([r["timestamp"] for r in past[-4:]]),
            "searched": searched(past),
            "user_count": math.log1p(sum(r["user_id"] == row["user_id"] for r in days)),
            "user_rate": smoothed([r for r in days if r["user_id"] == row["user_id"]], prior),
            "item_count": math.log1p(sum(r["item_id"] == row["item_id"] for r in days)),
            "genre_rate": smoothed([r for r in days if genre(row) and genre(r) == genre(row)], prior),
            "device_rate": smoothed([r for r in days if row["device"] == r["device"] != None], prior),  # noqa: E711
        }
        for feature in SCHEMA.features:
            if isinstance(feature, Statistic):  # standardised over training rows; the scale has its own test
                scale = world.encoders.scales[feature.name]
                want[feature.name] = (want[feature.name] - scale.mean) / scale.deviation
        age = age_of.get(row["user_id"])
        want["age"] = 0.0 if age is None else (age - np.mean(ages)) / np.std(ages)
        for name, value in want.items():
            expected = value if isinstance(value, int | list) else pytest.approx(value, abs=1e-5)
            assert got[name][at] == expected, (name, row)


def test_a_sequence_of_others_leaves_out_the_events_own_item(log: pa.Table) -> None:
    by_name = {feature.name: feature.model_dump() for feature in SCHEMA.features}
    by_name["clicked"] |= {"others_only": True, "max_length": 9}
    world = world_of(log, Schema.parse({**SCHEMA.model_dump(), "features": list(by_name.values())}))
    item_rows = world.item_inputs["item"][world.items.positions(log["item_id"])]
    rows = log.to_pylist()
    got = features(log, world, np.arange(len(log)))["clicked"].to_pylist()
    repeats = 0
    for at, row in enumerate(rows):
        past = [
            n
            for n, r in enumerate(rows)
            if r["user_id"] == row["user_id"] and r["timestamp"] < row["timestamp"] and r["click"]
        ][-9:]
        others = [n for n in past if rows[n]["item_id"] != row["item_id"]]
        assert got[at] == item_rows[others].tolist()
        repeats += len(others) < len(past)
    assert repeats > 0
    states = user_states(log, world, SPLIT, "test").to_pylist()  # a user as such has no item: nothing goes
    for state in states:
        past = [
            n
            for n, r in enumerate(rows)
            if r["user_id"] == state["user_id"] and r["date"] < SPLIT.test_from and r["click"]
        ]
        assert state["clicked"] == item_rows[past[-9:]].tolist()


def test_vocabularies_hold_what_training_saw(log: pa.Table, world: World) -> None:
    fitted = log.filter(pc.less(log["date"], pa.scalar(SPLIT.valid_from)))
    genre_of = {r["item_id"]: r["genre"] for r in items().to_pylist()}
    seen = Counter(genre_of.get(i) for i in fitted["item_id"].to_pylist())
    want = {g for g, n in seen.items() if g is not None and n >= 2}
    assert set(world.encoders.vocabularies["genre"].values.to_pylist()) == want
    assert set(world.encoders.vocabularies["user"].values.to_pylist()) == set(fitted["user_id"].to_pylist())


def test_the_future_changes_nothing(log: pa.Table, world: World) -> None:
    """Flip every outcome from some moment on: no feature of an earlier event, and no encoder, moves."""
    moment = pa.scalar(dt.datetime.combine(SPLIT.test_from, dt.time(12), dt.UTC), log["timestamp"].type)
    late = np.asarray(pc.greater_equal(log["timestamp"], moment))
    flipped = pa.array(np.where(late, 1 - np.nan_to_num(np.asarray(log["click"])), np.asarray(log["click"])))
    click = pa.array(flipped.to_numpy(), from_pandas=True).cast(pa.int8())
    changed = log.set_column(log.column_names.index("click"), "click", click)
    assert world_of(changed).encoders.digest() == world.encoders.digest()
    every = np.arange(len(log))
    before, after = features(log, world, every), features(changed, world, every)
    early = pa.array(np.asarray(pc.less_equal(log["timestamp"], moment)))
    moved = [n for n in before if before[n].filter(early) != after[n].filter(early)]
    assert moved == []
    assert before["clicked"] != after["clicked"], "the flip reached nothing: the test cannot fail"


def test_file_order_changes_nothing(world: World, log: pa.Table) -> None:
    again = sort_events(log.take(np.random.default_rng(1).permutation(len(log))))
    assert examples(again, world, SPLIT).equals(examples(log, world, SPLIT))


def test_user_states_are_the_users_as_the_split_begins(log: pa.Table, world: World) -> None:
    states = user_states(log, world, SPLIT, "test").to_pylist()
    rows = log.to_pylist()
    positive = [r for r in rows if r["date"] >= SPLIT.test_from and (r["click"] or r["like"])]
    assert {s["user_id"] for s in states} == {r["user_id"] for r in positive}
    for state in states:
        past = [r for r in rows if r["user_id"] == state["user_id"] and r["date"] < SPLIT.test_from]
        wanted = {r["item_id"] for r in positive if r["user_id"] == state["user_id"]}
        assert state["truth"] == sorted(row_of(world, "item", i) for i in wanted)
        assert state["seen"] == sorted(row_of(world, "item", i) for i in {r["item_id"] for r in past})
        clicked = [r for r in past if r["click"]][-3:]
        assert state["clicked"] == [row_of(world, "item", r["item_id"]) for r in clicked]
        scale = world.encoders.scales["user_count"]
        count = state["user_count"] * scale.deviation + scale.mean
        assert count == pytest.approx(math.log1p(len(past)), abs=1e-5)


def test_what_serving_keeps_of_the_past_gives_the_same_lists(log: pa.Table, world: World) -> None:
    kept = recent(log, SCHEMA)
    assert len(kept) < len(log) / 2
    users = pc.unique(log["user_id"])
    moment = pa.array([dt.datetime(2030, 1, 1, tzinfo=dt.UTC)] * len(users), log["timestamp"].type)
    asked = pa.table({"user_id": users, "timestamp": moment, STATE: [True] * len(users)})
    found = []
    for past in (log, kept):
        both = sort_events(pa.concat_tables([past, asked], promote_options="default"))
        columns = features(both, world, np.flatnonzero(both[STATE].is_valid()))
        found.append({feature.name: columns[feature.name].to_pylist() for feature in SCHEMA.lists})
    assert found[0] == found[1] and any(found[0]["searched"])


@pytest.mark.parametrize("name", ["clicked", "shown"])
@pytest.mark.parametrize("until", ["train", "valid"])
def test_chunks_hold_each_event_after_its_past_once(log: pa.Table, name: str, until: str) -> None:
    stamps = pc.add(log["timestamp"].cast(pa.int64()), pa.array(np.arange(len(log))))  # no two alike
    log = log.set_column(
        log.column_names.index("timestamp"), "timestamp", stamps.cast(pa.timestamp("us", "UTC"))
    )
    world, [feature] = world_of(log), [f for f in SCHEMA.item_sequences if f.name == name]
    end = SPLIT.valid_from if until == "train" else SPLIT.test_from
    pasts: dict[str, list[int]] = {}
    for row in log.to_pylist():
        if row["date"] < end and (row["click"] or name == "shown"):
            pasts.setdefault(row["user_id"], []).append(row_of(world, "item", row["item_id"]))
    learned = Counter[tuple[str, int]]()
    made = chunks(log, world, SPLIT, feature, until)
    for user, past in pasts.items():
        at = {r["timestamp"]: n for n, r in enumerate(r for r in log.to_pylist() if wanted_by(r, user, name))}
        for row in made.filter(pc.equal(made["user_id"], user)).to_pylist():
            here = at[row["timestamp"]]
            assert row["item"] == past[here] and row[name] == past[:here][-feature.max_length :]
            learned.update((user, here - back) for back in range(max(len(row[name]), 1)))
    assert learned == Counter((user, n) for user, items in pasts.items() for n in range(len(items)))
    assert len(made) < 0.6 * sum(map(len, pasts.values()))


def test_chunks_list_no_event_that_is_dated_later(log: pa.Table) -> None:
    """A log's own dates need not follow its times, as around midnight."""
    feature = next(f for f in SCHEMA.item_sequences if f.name == "shown")
    dates = log["date"].to_pylist()
    row = next(n for n, day in enumerate(dates) if day < SPLIT.valid_from)
    held_out = [*dates[:row], SPLIT.valid_from, *dates[row + 1 :]]
    later = log.set_column(log.column_names.index("date"), "date", pa.array(held_out, log["date"].type))
    without = log.filter(pa.array(np.arange(len(log)) != row))
    made = [chunks(events, world_of(log), SPLIT, feature, "train") for events in (later, without)]
    assert made[0].equals(made[1])


def wanted_by(row: dict[str, Any], user: str, name: str) -> bool:
    return row["user_id"] == user and bool(row["click"] or name == "shown")


def test_examples_of_ranking_are_exposures_and_of_recall_positives(log: pa.Table, world: World) -> None:
    made = examples(log, world, SPLIT)
    assert pc.sum(made["_ranking"]).as_py() == len(log) - pc.sum(log["history"]).as_py()
    seen, positive = set(), 0
    for row in log.to_pylist():
        pair = (row["user_id"], row["item_id"])
        positive += bool(row["click"] or row["like"]) and pair not in seen
        seen.add(pair)
    assert pc.sum(made["weight"]).as_py() == positive
    assert len(set(made["_order"].to_pylist())) > 0.95 * len(made)


def test_labels_and_context_may_be_called_as_what_preparation_adds(log: pa.Table, tmp_path: Path) -> None:
    """Until its rows are written it adds columns of its own: which shard, in what order, what asks."""
    own = ("order", "split", "ranking", "shard", "part", "bucket")
    changed: dict[str, Any] = {
        "labels": [*SCHEMA.model_dump()["labels"], *({"name": name} for name in own)],
        "features": [
            *SCHEMA.model_dump()["features"],
            {"kind": "categorical", "name": "place", "column": "state"},
        ],
    }
    ones = pa.array(np.ones(len(log), np.int8))
    for name in own:
        log = log.append_column(name, ones)
    log = log.append_column("state", pa.array(np.resize(["open", "shut"], len(log))))
    schema = Schema.parse({**SCHEMA.model_dump(), **changed})
    routed = log.append_column(stages.BUCKET, pa.array(np.zeros(len(log), np.int32)))
    routed = routed.append_column(stages.PART, routed[stages.BUCKET])
    routed = routed.append_column("row", pa.array(np.arange(len(log))))
    list(stages.write_bucket(routed, tmp_path, ["a"], keep_duplicates=True))
    built = stages.build_bucket(tmp_path, 0, world_of(log, schema), SPLIT, dict.fromkeys(SPLITS, 1))
    written = [w for w in stages.write_shards(built, tmp_path, dict.fromkeys(SPLITS, 1)) if w["rows"]]
    assert {w["split"] for w in written} >= {f"ranking/{name}" for name in SPLITS}
    for shard in (pq.read_table(tmp_path / str(w["file"])) for w in written):
        assert all(pc.sum(shard[name]).as_py() == len(shard) for name in own)
        assert set(shard["place"].to_pylist()) <= {1, 2}


def test_statistics_are_standard_over_training_rows(log: pa.Table, world: World) -> None:
    rows = log.filter(pc.less(log["date"], pa.scalar(SPLIT.valid_from)))
    of = np.flatnonzero(~np.asarray(rows["history"]))
    made = features(rows, world, of)
    for feature in SCHEMA.features:
        if isinstance(feature, Statistic):
            values = made[feature.name].to_numpy()
            if feature.key == "device":  # null is not counted, and stands at a rate of the prior
                values = values[np.asarray(pc.is_valid(rows["device"].take(pa.array(of))))]
            assert values.mean() == pytest.approx(0, abs=1e-4), feature.name
            assert values.std() == pytest.approx(1, abs=1e-4), feature.name


def test_encoders_survive_their_files(world: World, tmp_path: Any) -> None:
    world.encoders.save(tmp_path)
    assert fitting.Encoders.load(tmp_path).digest() == world.encoders.digest()
