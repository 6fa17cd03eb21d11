"""A behaviour log with a known truth: every exposure keeps the probability with which it was clicked.

Users come in sessions (hours apart, more in the evening); each is shown ranked slates, seconds
between exposures. Candidates are drawn by Zipf popularity, ranked by a noisy guess of their appeal,
and the top ones shown, so what a user sees already depends on taste, as in real logs. Then

    logit P(click) = base + strength x <taste(user, day), factors(item)> + quality(item)
                     + position_effect x log(1 + position) + momentum x [topic of the session's last click]
    taste(user, day)  = centre(segment) + individual x z(user) + drift x walk(user, day)
    factors(item)     = factors(topic) + 0.1 x noise(item)

with independent normal z and noise, and walk a stationary first-order autoregression over days. A
click is watched for a lognormal share of the item's duration, longer the better it fits the taste.

What a model can learn: centre and topic factors from `users.segment` and `items.topic` (their cross
is a table of segments x topics), quality from the item's id and its rates, position from the
context, momentum from the sequence of clicks. z takes many events per user; the walk only recent
ones; both are small by default, so that a good model comes within .01 AUC of `bayes_probability`
on a few 100,000 events. Raise `drift`, `individual` or `momentum` to make histories matter more.

A part is a block of users. Each block has random streams of its own, so the log does not depend on
who generates it where, and memory is bounded by the block.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from recsys_dist.config import rng_for
from recsys_dist.data.columns import TimestampUnit
from recsys_dist.data.sources.protocol import CHUNK_ROWS, Part, SourceConfig
from recsys_dist.errors import SourceError
from recsys_dist.feature_kinds import Categorical, Cross, Numeric, Sequence, Sessions, Statistic, Time
from recsys_dist.schema import Label, Schema

DIM = 8  # of tastes and item factors
BLOCK_EVENTS = 100_000  # generated at a time: about 100 MB while at it
CANDIDATES = 3  # per place in the slate
SLATES_PER_SESSION = 3
SLOT_US = 2 * 3_600_000_000  # sessions begin within the first minutes of a two-hour slot
SLOTS_PER_DAY = 12
EVENING = np.array([2, 1, 1, 2, 4, 5, 6, 6, 6, 8, 10, 6], float)  # sessions by slot of the day
DAY_CORRELATION = 0.9  # of the walk, from one day to the next
AGES = np.array(["18-24", "25-34", "35-44", "45-54", "55+"])


class Config(SourceConfig):
    """Size, seed and difficulty of the log; strengths are standard deviations of logits, about."""

    kind: Literal["simulate"] = "simulate"
    seed: int = 0
    users: int = Field(2_000, ge=1)
    items: int = Field(1_000, ge=2)
    events: int = Field(800_000, ge=1)
    days: int = Field(14, ge=1)
    first_day: date = date(2024, 1, 1)
    segments: int = Field(12, ge=1)
    topics: int = Field(20, ge=1)
    slate: int = Field(10, ge=1, description="exposures ranked together; their place is `position`")
    zipf: float = Field(1.0, ge=0, description="exponent of the items' popularity")
    base: float = Field(-1.6, description="logit of a click at position 0 for a neutral taste")
    strength: float = Field(1.2, ge=0)
    quality: float = Field(0.3, ge=0)
    position_effect: float = Field(-0.5, le=0)
    individual: float = Field(0.1, ge=0)
    drift: float = Field(0.08, ge=0)
    momentum: float = Field(0.2, ge=0)


def recognise(given: str) -> Config | None:
    """No path is a simulation, only the word."""
    return Config() if given == "simulate" else None


@dataclass(frozen=True)
class Items:
    """topic, author [I] int; factors [I, DIM]; quality, duration_ms [I]; reach [I]: cumulative popularity."""

    topic: np.ndarray
    author: np.ndarray
    factors: np.ndarray
    quality: np.ndarray
    duration_ms: np.ndarray
    reach: np.ndarray


class Source:
    """Generates the log block by block of users."""

    timestamp_unit: TimestampUnit = "us"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def schema(self) -> Schema:
        return Schema(
            features=(
                Categorical(name="user", column="user_id"),
                Categorical(name="item", column="item_id"),
                Categorical(name="segment", column="users.segment"),
                Categorical(name="age", column="users.age"),
                Categorical(name="topic", column="items.topic"),
                Categorical(name="author", column="items.author"),
                Categorical(name="position", column="position"),
                Time(name="hour", part="hour"),
                Time(name="weekday", part="weekday"),
                Cross(name="segment_topic", of=("segment", "topic"), hash_buckets=5_000),
                Cross(name="user_topic", of=("user", "topic")),
                Sequence(name="clicked", of="item", where="click"),
                Sequence(name="clicked_topics", of="topic", where="click"),
                Sessions(name="clicked_sessions", where="click"),
                Sequence(name="last_topic", of="topic", where="click", max_length=1),
                Numeric(name="log_duration", column="items.duration_ms", log=True),
                Statistic(name="user_count", key="user_id"),
                Statistic(name="user_click_rate", key="user_id", label="click"),
                Statistic(name="item_count", key="item_id"),
                Statistic(name="item_click_rate", key="item_id", label="click"),
                Statistic(name="item_long_view_rate", key="item_id", label="long_view"),
                Statistic(name="topic_click_rate", key="items.topic", label="click"),
                Statistic(name="author_click_rate", key="items.author", label="click"),
            ),
            labels=(Label(name="click"), Label(name="long_view"), Label(name="watch_ms", kind="value")),
            ranking_label="click",
            recall_positive=("long_view",),
        )

    def parts(self) -> list[Part]:
        if self._last_moment() > datetime.now(UTC):
            cfg = self.cfg
            raise SourceError(
                f"simulate: {cfg.days} days from {cfg.first_day} reach into the future, where a log cannot; "
                f"set an earlier first_day or fewer days"
            )
        size = max(1, math.floor(BLOCK_EVENTS * self.cfg.users / self.cfg.events))
        starts = range(0, self.cfg.users, size)
        ends = [min(start + size, self.cfg.users) for start in starts]
        return [
            Part(f"users {start}-{end - 1}", first=start, last=end)
            for start, end in zip(starts, ends, strict=True)
        ]

    def read(self, part: Part) -> Iterator[pa.Table]:
        events = _generate(self.cfg, self.world, part.first, part.last)
        for start in range(0, len(events), CHUNK_ROWS):
            yield events.slice(start, CHUNK_ROWS)

    def users(self) -> pa.Table | None:
        segments = np.concatenate([_segments(self.cfg, part.first, part.last) for part in self.parts()])
        rng = rng_for(self.cfg.seed, "simulate", "ages")
        return pa.table(
            {
                "user_id": pa.array(np.arange(self.cfg.users)).cast(pa.string()),
                "segment": _named("segment", segments),
                "age": pa.array(AGES[rng.integers(0, len(AGES), self.cfg.users)]),
            }
        )

    def items(self) -> pa.Table | None:
        return pa.table(
            {
                "item_id": pa.array(np.arange(self.cfg.items)).cast(pa.string()),
                "topic": _named("topic", self.world.topic),
                "author": _named("author", self.world.author),
                "duration_ms": self.world.duration_ms.astype(np.float64),
            }
        )

    def default_split(self) -> date | None:
        return None

    @cached_property
    def world(self) -> Items:
        """The items, and by whom they are liked: the same in every block."""
        cfg, rng = self.cfg, rng_for(self.cfg.seed, "simulate", "items")
        topic = rng.integers(0, cfg.topics, cfg.items)
        per_topic = max(1, math.ceil(cfg.items / cfg.topics / 10))
        popularity = rng.permutation(np.arange(1, cfg.items + 1.0) ** -cfg.zipf)
        noise = 0.1 * rng.standard_normal((cfg.items, DIM)) / math.sqrt(DIM)
        return Items(
            topic=topic,
            author=topic * per_topic + rng.integers(0, per_topic, cfg.items),
            factors=(_topic_factors(cfg)[topic] + noise).astype(np.float32),
            quality=cfg.quality * rng.standard_normal(cfg.items),
            duration_ms=np.round(np.exp(rng.normal(10.3, 0.8, cfg.items))),  # median 30 s
            reach=np.cumsum(popularity) / popularity.sum(),
        )

    def _last_moment(self) -> datetime:
        last = date.fromordinal(self.cfg.first_day.toordinal() + self.cfg.days)
        return datetime(last.year, last.month, last.day, tzinfo=UTC)


def _named(prefix: str, numbers: np.ndarray) -> pa.Array:
    return pa.array([f"{prefix}-{n:02d}" for n in range(int(numbers.max()) + 1)]).take(pa.array(numbers))


def _topic_factors(cfg: Config) -> np.ndarray:
    rng = rng_for(cfg.seed, "simulate", "topics")
    return rng.standard_normal((cfg.topics, DIM)) / math.sqrt(DIM)


def _segments(cfg: Config, first: int, last: int) -> np.ndarray:
    return rng_for(cfg.seed, "simulate", "segments", first).integers(0, cfg.segments, last - first)


def _tastes(cfg: Config, first: int, last: int, rng: np.random.Generator) -> np.ndarray:
    """[days, users of the block, DIM] float32."""
    shape = (last - first, DIM)
    centres = rng_for(cfg.seed, "simulate", "centres").standard_normal((cfg.segments, DIM))
    stable = centres[_segments(cfg, first, last)] + cfg.individual * rng.standard_normal(shape)
    walk = rng.standard_normal(shape)
    days = np.empty((cfg.days, *shape), np.float32)
    for day in range(cfg.days):
        days[day] = stable + cfg.drift * walk
        step = rng.standard_normal(shape)
        walk = DAY_CORRELATION * walk + math.sqrt(1 - DAY_CORRELATION**2) * step
    return days


def _generate(cfg: Config, world: Items, first: int, last: int) -> pa.Table:
    """Events of users first..last-1, by user and time. N slates, P places, n events.

    Their number is that of the whole log's events in proportion to the users, to the event.
    """
    rng = rng_for(cfg.seed, "simulate", "events", first)
    tastes = _tastes(cfg, first, last, rng)
    rows = cfg.events * last // cfg.users - cfg.events * first // cfg.users
    activity = np.exp(rng.normal(0, 0.8, last - first))
    per_user = rng.multinomial(rows, activity / activity.sum())
    user_N, slot_N, shown_N = _sessions(cfg, per_user, rng)
    taste_N = tastes[slot_N // SLOTS_PER_DAY, user_N]
    item_NP, affinity_NP = _slates(cfg, world, taste_N, rng)
    mask_NP = np.arange(cfg.slate) < shown_N[:, None]
    position = np.broadcast_to(np.arange(cfg.slate), mask_NP.shape)[mask_NP]
    user, slot = np.repeat(user_N, shown_N), np.repeat(slot_N, shown_N)
    item, affinity = item_NP[mask_NP], affinity_NP[mask_NP].astype(np.float64)
    logit = cfg.base + cfg.strength * affinity + world.quality[item]
    logit += cfg.position_effect * np.log1p(position)
    session = np.cumsum(np.r_[0, (np.diff(user) != 0) | (np.diff(slot) != 0)])[: len(user)]
    p, click = _clicks(logit, cfg.momentum, per_user, session, world.topic[item], rng)
    duration_ms = world.duration_ms[item]
    share = np.minimum(np.exp(rng.normal(-0.8 + 0.5 * affinity, 0.7)), 2.0)
    watch_ms = np.where(click, np.round(duration_ms * share), 0.0)
    return pa.table(
        {
            "user_id": first + user,
            "item_id": item,
            "timestamp": _instants(cfg, slot, session, position, rng),
            "click": click.astype(np.int8),
            "long_view": (click & (watch_ms >= np.minimum(duration_ms, 18_000))).astype(np.int8),
            "watch_ms": watch_ms,
            "position": position,
            "bayes_probability": p,
            "row": np.arange(rows),
        }
    )


def _sessions(
    cfg: Config, per_user: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per slate, by user and time: its user, its two-hour slot of the log, and how many places are shown."""
    slates = -(-per_user // cfg.slate)
    user = np.repeat(np.arange(len(per_user)), slates)
    sessions = -(-slates // SLATES_PER_SESSION)
    chances = np.tile(EVENING, cfg.days)
    slot_of_session = rng.choice(len(chances), int(sessions.sum()), p=chances / chances.sum())
    first_session = np.cumsum(sessions) - sessions
    session = first_session[user] + np.floor(rng.random(len(user)) * sessions[user]).astype(np.int64)
    slot = slot_of_session[session]
    slot = slot[np.lexsort((slot, user))]
    shown = np.full(len(user), cfg.slate)
    short = slates * cfg.slate - per_user
    shown[np.cumsum(slates)[slates > 0] - 1] -= short[slates > 0]
    return user, slot, shown


def _slates(
    cfg: Config, world: Items, taste_N: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """[N, P] items in the order shown, and [N, P] their affinity with the user's taste."""
    rows, wide = len(taste_N), CANDIDATES * cfg.slate
    draws = (np.arange(wide) + rng.random((rows, wide))) / wide  # stratified: few repeats of the head
    candidate = np.minimum(np.searchsorted(world.reach, draws), cfg.items - 1)
    candidate.sort(axis=1)
    affinity = np.einsum("nd,ncd->nc", taste_N, world.factors[candidate])
    guess = cfg.strength * affinity + world.quality[candidate] + rng.standard_normal((rows, wide))
    guess[:, 1:][candidate[:, 1:] == candidate[:, :-1]] = -np.inf  # a slate repeats no item if it can help it
    best = np.argsort(-guess, axis=1, kind="stable")[:, : cfg.slate]
    return np.take_along_axis(candidate, best, axis=1), np.take_along_axis(affinity, best, axis=1)


def _clicks(
    logit: np.ndarray,
    momentum: float,
    per_user: np.ndarray,
    session: np.ndarray,
    topic: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """[n] probability and [n] outcome; the k-th events of all users are drawn at once, for k = 0, 1, ..."""
    start = np.cumsum(per_user) - per_user
    busiest = np.argsort(-per_user, kind="stable")
    active = np.searchsorted(-per_user[busiest], -np.arange(per_user.max(initial=0)), "left")
    uniform = rng.random(len(logit))
    p = np.empty(len(logit))
    last_topic = np.full(len(per_user), -1)
    last_session = np.full(len(per_user), -1)
    for k, users in enumerate(active):
        who = busiest[:users]
        event = start[who] + k
        again = (last_topic[who] == topic[event]) & (last_session[who] == session[event])
        p[event] = 1 / (1 + np.exp(-(logit[event] + momentum * again)))
        clicked = uniform[event] < p[event]
        last_topic[who[clicked]] = topic[event[clicked]]
        last_session[who[clicked]] = session[event[clicked]]
    return p, uniform < p


def _instants(
    cfg: Config, slot: np.ndarray, session: np.ndarray, position: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """[n] microseconds since 1970, increasing within a session: seconds apart, more between slates."""
    gap_s = 1 + rng.exponential(9, len(slot)) + np.where(position == 0, 30, 0)
    starts = np.flatnonzero(np.r_[True, np.diff(session) != 0])[: len(slot)]
    sums = np.cumsum(gap_s)
    before = (sums - gap_s)[starts]
    offset_s = sums - before[session]
    total_s = np.maximum.reduceat(offset_s, starts) if len(starts) else offset_s
    fit = np.minimum(1, 6_000 / np.maximum(total_s, 1))  # a marathon is told faster rather than overlap
    begin_s = rng.random(len(starts)) * 900
    epoch_us = (cfg.first_day.toordinal() - date(1970, 1, 1).toordinal()) * SLOTS_PER_DAY * SLOT_US
    seconds = begin_s[session] + offset_s * fit[session]
    return epoch_us + slot * SLOT_US + np.round(seconds * 1e6).astype(np.int64)
