"""The simulator's truth: its probabilities are the clicks' own, and it does what its docstring says."""

import math
from datetime import UTC, date, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest

from recsys_dist.data.logs import duplicates
from recsys_dist.data.sources.simulate import Config, Source
from recsys_dist.errors import SourceError

SMALL = {"users": 400, "items": 300, "events": 60_000}


def log(**settings: object) -> pa.Table:
    source = Source(Config.parse({**SMALL, **settings}))
    return pa.concat_tables(chunk for part in source.parts() for chunk in source.read(part))


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def auc(label: np.ndarray, score: np.ndarray) -> float:
    """The chance that a positive scores above a negative, ties half: by the definition, on 2,000 of each."""
    positive, negative = score[label == 1][:2_000, None], score[label == 0][None, :2_000]
    return float((positive > negative).mean() + 0.5 * (positive == negative).mean())


@pytest.fixture(scope="module")
def events() -> pa.Table:
    return log()


def test_the_number_of_events_is_exact() -> None:
    for users, rows in ((7, 1_000), (1, 999), (400, 250_001)):
        assert len(log(users=users, events=rows, items=50)) == rows


def test_the_seed_and_nothing_else_decides(events: pa.Table) -> None:
    assert log().equals(events)
    assert not log(seed=1)["click"].equals(events["click"])
    source = Source(Config(users=300, events=250_000, items=50))
    assert len(source.parts()) == 3
    backwards = [list(source.read(part)) for part in reversed(source.parts())]
    for chunks, part in zip(reversed(backwards), source.parts(), strict=True):
        assert pa.concat_tables(chunks).equals(pa.concat_tables(Source(source.cfg).read(part)))


def test_clicks_have_the_probability_that_is_written_down(events: pa.Table) -> None:
    p, click = column(events, "bayes_probability"), column(events, "click")
    order = np.argsort(p)
    for part in np.array_split(order, 10):
        sigma = math.sqrt((p[part] * (1 - p[part])).sum()) / len(part)
        assert abs(click[part].mean() - p[part].mean()) < 4 * sigma
    assert 0.1 < click.mean() < 0.3
    assert 0.7 < auc(click, p) < 0.9


def test_events_of_a_user_are_in_time_order_within_the_days(events: pa.Table) -> None:
    user, time = column(events, "user_id"), events["timestamp"].to_numpy()
    gap_s = np.diff(time)[np.diff(user) == 0] / 1e6
    assert (np.diff(user) >= 0).all() and gap_s.min() > 0
    assert np.median(gap_s) < 60 and (gap_s > 3600).mean() > 0.01  # bursts, hours apart
    first = datetime(2024, 1, 1, tzinfo=UTC).timestamp() * 1e6
    assert time.min() >= first and time.max() < first + 14 * 86_400e6
    canonical = events.set_column(2, "timestamp", events["timestamp"].cast(pa.timestamp("us")))
    text = {name: canonical[name].cast(pa.string()) for name in ("user_id", "item_id")}
    history = pa.repeat(False, len(events))
    assert not duplicates(pa.table({**text, "timestamp": canonical["timestamp"], "history": history})).any()


def test_popularity_is_zipf() -> None:
    shown = column(log(strength=0, quality=0, items=1_000, zipf=0.8), "item_id")
    counts = np.sort(np.bincount(shown, minlength=1_000))[::-1]
    slope = np.polyfit(np.log(np.arange(10, 300)), np.log(counts[9:299]), 1)[0]
    assert slope == pytest.approx(-0.8, abs=0.08)


def test_later_places_are_clicked_less_for_the_same_taste() -> None:
    flat = log(strength=0, quality=0, momentum=0, position_effect=-0.5, base=-1.0)
    place, p = column(flat, "position"), column(flat, "bayes_probability")
    expected = 1 / (1 + np.exp(1.0 + 0.5 * np.log1p(place)))
    np.testing.assert_allclose(p, expected, rtol=1e-6)


def test_momentum_is_the_topic_of_the_sessions_last_click() -> None:
    settings = {
        "strength": 0,
        "quality": 0,
        "position_effect": 0,
        "base": -1.0,
        "momentum": 1.0,
        "events": 3_000,
    }
    table = log(**settings, topics=3)
    topic = Source(Config.parse({**SMALL, **settings, "topics": 3})).world.topic
    last, before = {}, {}
    rows = zip(
        *(column(table, n).tolist() for n in ("user_id", "item_id", "timestamp", "click")), strict=True
    )
    for row, (user, item, time, click) in enumerate(rows):
        slot = time // 7_200_000_000
        again = last.get(user) == topic[item] and before.get(user) == slot
        expected = 1 / (1 + math.exp(1.0 - again))
        assert table["bayes_probability"][row].as_py() == pytest.approx(expected)
        if click:
            last[user], before[user] = topic[item], slot


def daily_change(drift: float) -> float:
    """Mean absolute change of a user's logits for the same item, from the first half to the second."""
    table = log(users=4, items=3, events=80_000, drift=drift, momentum=0, position_effect=0, slate=1)
    p, time = column(table, "bayes_probability"), column(table, "timestamp")
    logit = np.log(p / (1 - p))
    late = time > np.median(time)
    group = column(table, "user_id") * 3 + column(table, "item_id")
    halves = [(logit[(group == g) & late], logit[(group == g) & ~late]) for g in range(12)]
    return float(np.mean([abs(a.mean() - b.mean()) for a, b in halves if len(a) and len(b)]))


def test_tastes_drift_as_told() -> None:
    assert daily_change(0) < 1e-9
    assert 0.02 < daily_change(0.2) < daily_change(2.0)


def test_watching() -> None:
    table = log(events=5_000)
    click, watch, long = (column(table, n) for n in ("click", "watch_ms", "long_view"))
    duration = Source(Config.parse({**SMALL, "events": 5_000})).world.duration_ms[column(table, "item_id")]
    assert (watch[click == 0] == 0).all() and (watch[click == 1] > 0).all()
    assert (watch <= 2 * duration).all()
    np.testing.assert_array_equal(long, (click == 1) & (watch >= np.minimum(duration, 18_000)))


def test_the_future_cannot_be_simulated() -> None:
    tomorrow = date.today() + timedelta(days=1)
    with pytest.raises(SourceError, match="earlier first_day or fewer days"):
        Source(Config(first_day=tomorrow)).parts()
