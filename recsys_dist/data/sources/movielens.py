"""MovieLens in GroupLens' own files: ml-1m (`ratings.dat`, fields split by `::`) and ml-latest, ml-20m,
ml-25m (`ratings.csv`). Harper and Konstan, ACM TiiS 2015. A rating is an event; `like` is a high one.

ml-1m tells the users' gender, age band, occupation and zip code; the csv releases do not.
"""

import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from recsys_dist.data.columns import TimestampUnit, numbers
from recsys_dist.data.sources import files
from recsys_dist.data.sources.protocol import Part, SourceConfig
from recsys_dist.errors import SourceError
from recsys_dist.feature_kinds import AnyFeature, Bucketed, Categorical, Cross, Sequence, Statistic, Time
from recsys_dist.schema import Label, Schema

COLUMNS = ["user_id", "item_id", "rating", "timestamp"]
CSV_COLUMNS = ["userId", "movieId", "rating", "timestamp"]
# `::` read with the delimiter `:` has an empty field between any two
DAT_FIELDS = ["user_id", "_1", "item_id", "_2", "rating", "_3", "timestamp"]
TITLE_YEAR = re.compile(r"\((\d{4})\)\s*$")


class Config(SourceConfig):
    """Where the files are, and from which rating on a film is liked (4 as in ReChorus and most papers)."""

    kind: Literal["movielens"] = "movielens"
    path: str
    like_from: float = Field(4.0, ge=0.5, le=5)
    utc_offset_hours: float = Field(0.0, ge=-12, le=14)


class Source:
    """One part: the ratings file."""

    timestamp_unit: TimestampUnit = "s"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def schema(self) -> Schema:
        return Schema(
            features=tuple(features(with_users=self._has("users.dat"))),
            labels=(Label(name="like"), Label(name="rating", kind="value")),
            ranking_label="like",
            recall_positive=("like",),
            utc_offset_hours=self.cfg.utc_offset_hours,
        )

    def parts(self) -> list[Part]:
        name = self._ratings()
        return [Part(name, str(Path(self.cfg.path, name)))]

    def read(self, part: Part) -> Iterator[pa.Table]:
        if part.file.endswith(".dat"):
            chunks = files.csv_chunks(part.file, COLUMNS, ":", DAT_FIELDS)
        else:
            files.require(part.file, CSV_COLUMNS, files.columns_of(part.file).names)
            chunks = files.csv_chunks(part.file, CSV_COLUMNS)
        renamed = dict(zip(CSV_COLUMNS, COLUMNS, strict=True))
        for chunk in chunks:
            named = chunk.rename_columns([renamed.get(name, name) for name in chunk.column_names])
            yield named.append_column("like", _at_least(named["rating"], self.cfg.like_from))

    def users(self) -> pa.Table | None:
        if not self._has("users.dat"):
            return None
        url = self._path("users.dat")
        table = pa.table(_dat(url, ["user_id", "gender", "age", "occupation", "zip"]))
        table = table.append_column("region", pa.array([zip_[:2] for zip_ in table["zip"].to_pylist()]))
        return files.described(table, "user_id", "user_id", [], url)

    def items(self) -> pa.Table | None:
        if self._has("movies.dat"):
            url = self._path("movies.dat")
            table = pa.table(_dat(url, ["item_id", "title", "genres"]))
        else:
            url = self._path("movies.csv")
            table = files.read_table(url)
            files.require(url, ["movieId", "title", "genres"], table.column_names)
            table = table.rename_columns({"movieId": "item_id"})
        years = [TITLE_YEAR.search(title or "") for title in table["title"].to_pylist()]
        genres = table["genres"].to_pylist()
        table = table.append_column("year", pa.array([year and year[1] for year in years], pa.string()))
        table = table.append_column(
            "genre", pa.array([text and text.split("|")[0] for text in genres], pa.string())
        )
        return files.described(table, "item_id", "item_id", ["year"], url)

    def default_split(self) -> date | None:
        return None

    def _ratings(self) -> str:
        for name in ("ratings.dat", "ratings.csv"):
            if self._has(name):
                return name
        raise SourceError(
            f"{self.cfg.path}: neither ratings.dat nor ratings.csv is there; expected the directory that "
            f"GroupLens' archive unpacks to, as ml-1m or ml-latest-small"
        )

    def _has(self, name: str) -> bool:
        return Path(self._path(name)).is_file()

    def _path(self, name: str) -> str:
        return str(files.local(self.cfg.path).absolute() / name)


def recognise(given: str) -> Config | None:
    """The config for a directory of MovieLens files."""
    found = any(Path(given, name).is_file() for name in ("ratings.dat", "ratings.csv"))
    return Config(path=given) if found else None


def _at_least(rating: pa.ChunkedArray, threshold: float) -> pa.Array:
    """0/1; null where the rating is missing or no number, for `validate` to find."""
    parsed = numbers(rating.combine_chunks())
    return pa.array((parsed.values >= threshold).astype(np.int8), mask=parsed.missing | parsed.bad)


def _dat(url: str, names: list[str]) -> dict[str, list[str]]:
    """Columns of one of the small `::` files (thousands of lines), which GroupLens ships in Latin-1."""
    try:
        lines = Path(url).read_text(encoding="latin-1").splitlines()
    except OSError as error:
        raise SourceError(f"{url}: cannot be read, {error.strerror}") from None
    rows = [line.split("::") for line in lines]
    for number, row in enumerate(rows):
        if len(row) != len(names):
            raise SourceError(
                f"{url}: line {number + 1} has {len(row)} fields, expected {len(names)}: {'::'.join(names)}"
            )
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def features(with_users: bool, max_length: int = 50) -> Iterator[AnyFeature]:
    """Of users (where they are described), films, time, and what the user rated: `max_length` films."""
    yield Categorical(name="user", column="user_id")
    yield Categorical(name="item", column="item_id")
    yield Categorical(name="genre", column="items.genre")
    yield Categorical(name="genres", column="items.genres")
    yield Bucketed(name="year", column="items.year")
    yield Time(name="hour", part="hour")
    yield Time(name="weekday", part="weekday")
    if with_users:
        for name in ("gender", "age", "occupation", "region"):
            yield Categorical(name=name, column=f"users.{name}")
        yield Cross(name="age_gender_genres", of=("age", "gender", "genres"))
    yield Cross(name="user_genres", of=("user", "genres"))
    yield Sequence(name="liked", of="item", where="like", max_length=max_length)
    yield Sequence(name="liked_genres", of="genres", where="like", max_length=max_length)
    yield Sequence(name="rated", of="item", max_length=max_length)
    for name, key in (("user", "user_id"), ("item", "item_id"), ("genres", "items.genres")):
        yield Statistic(name=f"{name}_count", key=key)
        yield Statistic(name=f"{name}_like_rate", key=key, label="like")
