"""KuaiRand (Gao et al., CIKM 2022, arXiv 2208.10696): short-video exposures with clicks and watch time.

Reads the upstream layout of KuaiRand-Pure (and -1K, whose files differ in name only):
`log_standard_*.csv`, `user_features_*.csv`, `video_features_basic_*.csv`; `log_random_*.csv` if
asked for. A cut that lacks the first days may come with `history_until_*.parquet`: per user the
last exposed videos before the log begins, oldest first, and which of them were watched long or
liked. They become history rows: context of what follows, never examples.

The log has 2.6 % repeated (user, video, time_ms), and its own `date` differs from the day of
time_ms at UTC+8 in 0.9 % of rows, around midnight; the published protocols split by `date`.
"""

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.data.columns import TimestampUnit
from recsys_dist.data.sources import files
from recsys_dist.data.sources.protocol import Part, SourceConfig
from recsys_dist.errors import SourceError
from recsys_dist.feature_kinds import (
    AnyFeature,
    Bucketed,
    Categorical,
    Cross,
    Numeric,
    Sequence,
    Sessions,
    Statistic,
    Time,
)
from recsys_dist.schema import Label, Schema

LOG_COLUMNS = {  # file -> canonical
    "user_id": "user_id",
    "video_id": "item_id",
    "time_ms": "timestamp",
    "date": "date",
    "is_click": "click",
    "long_view": "long_view",
    "is_like": "like",
    "play_time_ms": "watch_ms",
    "tab": "tab",
    "duration_ms": "duration_ms",
}
HISTORY_COLUMNS = ["user_id", "last_time_ms", "exposed_video_ids", "liked_video_ids", "long_view_video_ids"]
HISTORY_USERS = 2_048  # whose lists, of at most 50, become one chunk
USER_NUMBERS = ["follow_user_num", "fans_user_num", "friend_user_num", "register_days"]
USER_CATEGORIES = [
    "user_active_degree",
    "is_live_streamer",
    "is_video_author",
    "follow_user_num_range",
    "fans_user_num_range",
    "friend_user_num_range",
    "register_days_range",
    *(f"onehot_feat{i}" for i in range(18)),
]
ITEM_NUMBERS = ["video_duration"]


class Config(SourceConfig):
    """Where KuaiRand's files are, and whether its randomly exposed videos are read too."""

    kind: Literal["kuairand"] = "kuairand"
    path: str
    random: bool = False


class Source:
    """The log by file, in the order of their names (which is the order of time)."""

    timestamp_unit: TimestampUnit = "ms"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def schema(self) -> Schema:
        return Schema(
            features=tuple(_features()),
            labels=(
                Label(name="click"),
                Label(name="long_view"),
                Label(name="like"),
                Label(name="watch_ms", kind="value"),
            ),
            ranking_label="click",
            recall_positive=("long_view", "like"),
            recall_exposure_weight=0.3,
            utc_offset_hours=8,
        )

    def parts(self) -> list[Part]:
        patterns = ["log_standard_*.csv"] + (["log_random_*.csv"] if self.cfg.random else [])
        logs = [file for pattern in patterns for file in self._find(pattern)]
        history = self._history()
        return [Part(Path(f.path).name, f.url) for f in ([history] if history else []) + logs]

    def read(self, part: Part) -> Iterator[pa.Table]:
        if part.file.endswith(".parquet"):
            files.require(part.file, HISTORY_COLUMNS, files.columns_of(part.file).names)
            for chunk in files.parquet_chunks(part.file, HISTORY_COLUMNS):
                for first in range(0, len(chunk), HISTORY_USERS):
                    yield history_rows(chunk.slice(first, HISTORY_USERS))
            return
        files.require(part.file, LOG_COLUMNS, files.columns_of(part.file).names)
        for chunk in files.csv_chunks(part.file, list(LOG_COLUMNS)):
            yield chunk.rename_columns([LOG_COLUMNS.get(name, name) for name in chunk.column_names])

    def users(self) -> pa.Table | None:
        file = self._find("user_features_*.csv")[0]
        users = files.described(files.read_table(file.url), "user_id", "user_id", USER_NUMBERS, file.url)
        history = self._history()
        if history is None:
            return users.append_column("history_len", pa.nulls(len(users), pa.float64()))
        lengths = files.read_table(history.url)
        files.require(history.url, ["user_id", "history_len"], lengths.column_names)
        at = pc.index_in(users["user_id"], value_set=lengths["user_id"].cast(pa.string()).combine_chunks())
        return users.append_column("history_len", lengths["history_len"].cast(pa.float64()).take(at))

    def items(self) -> pa.Table | None:
        file = self._find("video_features_basic_*.csv")[0]
        return files.described(files.read_table(file.url), "video_id", "item_id", ITEM_NUMBERS, file.url)

    def default_split(self) -> date | None:
        return date(2022, 5, 1)

    def _find(self, pattern: str) -> list[files.File]:
        """Upstream archives keep the files in `data/`."""
        folder = self.cfg.path.rstrip("/")
        return _any(f"{folder}/data/{pattern}", ".csv") or files.find(f"{folder}/{pattern}", (".csv",))

    def _history(self) -> files.File | None:
        found = _any(f"{self.cfg.path.rstrip('/')}/history_until_*.parquet", ".parquet")
        return max(found, key=lambda file: file.url, default=None)


def _any(pattern: str, ending: str) -> list[files.File]:
    """What matches, which may be nothing."""
    try:
        return files.find(pattern, (ending,))
    except SourceError:
        return []


def recognise(given: str) -> Config | None:
    """The config for a directory of KuaiRand files."""
    path = Path(given)
    found = any(next(folder.glob("log_standard_*.csv"), None) for folder in (path, path / "data"))
    return Config(path=given) if found else None


def history_rows(users: pa.Table) -> pa.Table:
    """History rows out of per-user lists, in time order: one per exposed video, a millisecond apart.

    The k-th exposure of a video to a user is taken as watched long if the video is in the user's
    list at least k times, likewise liked. Clicks and watch time of that time are not known: null.
    """
    exposed = users["exposed_video_ids"].combine_chunks()
    owner = pc.list_parent_indices(exposed).to_numpy()
    video = pc.list_flatten(exposed).to_numpy()
    lengths = pc.fill_null(pc.list_value_length(exposed), 0).to_numpy()
    to_last = np.repeat(np.cumsum(lengths), lengths) - 1 - np.arange(len(owner))
    last_ms = pc.fill_null(users["last_time_ms"], 0).to_numpy()
    rows = len(owner)
    return pa.table(
        {
            "user_id": users["user_id"].take(pa.array(owner)),
            "item_id": video,
            "timestamp": last_ms[owner] - to_last,
            "date": pa.nulls(rows, pa.string()),
            "history": pa.repeat(True, rows),
            "click": pa.nulls(rows, pa.int8()),
            "long_view": _listed(owner, video, users["long_view_video_ids"]),
            "like": _listed(owner, video, users["liked_video_ids"]),
            "watch_ms": pa.nulls(rows, pa.float32()),
            "tab": pa.nulls(rows, pa.string()),
            "duration_ms": pa.nulls(rows, pa.string()),
            "row": users["row"].take(pa.array(owner)),
        }
    )


def _listed(owner: np.ndarray, video: np.ndarray, lists: pa.ChunkedArray) -> np.ndarray:
    """[rows] int8: is this the k-th time that `video` comes up for `owner`, and is it listed k times?"""
    listed = lists.combine_chunks()
    listed_video = pc.list_flatten(listed).to_numpy()
    span = int(max(video.max(initial=0), listed_video.max(initial=0))) + 1
    key = owner.astype(np.int64) * span + video
    order = np.argsort(key, kind="stable")
    grouped = key[order]
    nth = np.empty(len(key), np.int64)
    nth[order] = np.arange(len(key)) - np.searchsorted(grouped, grouped)
    in_list = np.sort(pc.list_parent_indices(listed).to_numpy().astype(np.int64) * span + listed_video)
    times = np.searchsorted(in_list, key, "right") - np.searchsorted(in_list, key, "left")
    return (nth < times).astype(np.int8)


def _features() -> Iterator[AnyFeature]:
    # Left out: weekday and upload_dt, of which six training days cannot teach (no Sunday among them).
    yield Categorical(name="user", column="user_id", min_count=3)
    yield Categorical(name="item", column="item_id")
    yield Categorical(name="author", column="items.author_id", min_count=3)
    yield Categorical(name="music", column="items.music_id", min_count=3)
    for name in ("tag", "video_type", "upload_type", "music_type"):
        yield Categorical(name=name, column=f"items.{name}")
    yield Bucketed(name="duration", column="items.video_duration")
    yield Categorical(name="tab", column="tab")
    yield Time(name="hour", part="hour")
    for name in USER_CATEGORIES:
        yield Categorical(name=name, column=f"users.{name}")
    yield Cross(name="user_tag", of=("user", "tag"))
    yield Cross(name="user_tab", of=("user", "tab"))
    yield Cross(name="item_tab", of=("item", "tab"))
    yield Cross(name="tab_tag", of=("tab", "tag"), hash_buckets=10_000)
    yield Cross(name="tab_hour", of=("tab", "hour"), hash_buckets=1_000)
    yield Cross(name="tab_duration", of=("tab", "duration"), hash_buckets=1_000)
    for where, name in (("long_view", "long_viewed"), ("click", "clicked"), (None, "exposed")):
        yield Sequence(name=name, of="item", where=where, max_length=20 if where == "click" else 50)
        yield Sequence(name=f"{name}_tags", of="tag", where=where, max_length=20)
    yield Sessions(name="clicked_sessions", where="click", max_length=20)
    yield Sessions(name="exposed_sessions", max_length=50)
    for name in [*USER_NUMBERS, "history_len"]:
        yield Numeric(name=f"log_{name}", column=f"users.{name}", log=True)
    yield Numeric(name="log_duration", column="items.video_duration", log=True)
    for name, key in (
        ("user", "user_id"),
        ("item", "item_id"),
        ("author", "items.author_id"),
        ("tag", "items.tag"),
        ("tab", "tab"),
    ):
        smoothing = 5.0 if name == "user" else 20.0
        yield Statistic(name=f"{name}_count", key=key)
        yield Statistic(name=f"{name}_long_view_rate", key=key, label="long_view", smoothing=smoothing)
        yield Statistic(name=f"{name}_click_rate", key=key, label="click", smoothing=smoothing)
