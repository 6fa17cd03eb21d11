"""MovieLens-1M with the global-time split of ReChorus 2.0 (Li et al., RecSys 2024), table 6: rank by `like`.

`splits/ctr_by_day/{train,dev,test}.parquet` beside GroupLens' own files: a rating of 4 or more is liked; the
local days at UTC+8 are cut 80/10/10; users and films with fewer than 5 likes, and those in dev and test that
training does not know, are left out. Their models read the last 20 films (`--history_max 20`), the film's
genres and title, and hour, weekday, part of day and day; here the users' attributes are read as well.
"""

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from recsys_dist.data.columns import TimestampUnit
from recsys_dist.data.sources import files, movielens
from recsys_dist.data.sources.protocol import Part, SourceConfig
from recsys_dist.data.split import Split
from recsys_dist.feature_kinds import Sequence
from recsys_dist.schema import Label, Schema

FOLDER = "splits/ctr_by_day"
NAMES = ("train.parquet", "dev.parquet", "test.parquet")
COLUMNS = {  # file -> canonical
    "user_id": "user_id",
    "movie_id": "item_id",
    "timestamp": "timestamp",
    "label": "like",
    "rating": "rating",
}


class Config(SourceConfig):
    """The directory of MovieLens-1M, and how many films the user's sequences hold."""

    kind: Literal["ml1m_ctr"] = "ml1m_ctr"
    path: str
    max_length: int = Field(20, ge=1, description="films of each sequence of the user's past")


class Source:
    """One part per published file."""

    timestamp_unit: TimestampUnit = "s"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.described = movielens.Source(movielens.Config(path=cfg.path))

    def schema(self) -> Schema:
        disliked = Sequence(name="disliked", of="item", where="dislike", max_length=self.cfg.max_length)
        return Schema(
            features=(*movielens.features(with_users=True, max_length=self.cfg.max_length), disliked),
            labels=(Label(name="like"), Label(name="dislike"), Label(name="rating", kind="value")),
            ranking_label="like",
            recall_positive=("like",),
            utc_offset_hours=8,
        )

    def parts(self) -> list[Part]:
        found = [files.find(f"{self.cfg.path}/{FOLDER}/{name}", (".parquet",))[0] for name in NAMES]
        return [Part(name, file.url) for name, file in zip(NAMES, found, strict=True)]

    def read(self, part: Part) -> Iterator[pa.Table]:
        files.require(part.file, COLUMNS, files.columns_of(part.file).names)
        for chunk in files.parquet_chunks(part.file, list(COLUMNS)):
            named = chunk.rename_columns([COLUMNS.get(name, name) for name in chunk.column_names])
            yield named.append_column("dislike", pc.subtract(1, named["like"]))

    def users(self) -> pa.Table | None:
        return self.described.users()

    def items(self) -> pa.Table | None:
        return self.described.items()

    def default_split(self) -> Split:
        return Split(valid_from=date(2002, 8, 6), test_from=date(2002, 11, 18))


def recognise(given: str) -> Config | None:
    """The config for the directory of the split; that of MovieLens-1M itself is a log of `movielens`."""
    if all(Path(given, name).is_file() for name in NAMES) and Path(given).absolute().match(FOLDER):
        return Config(path=str(Path(given).absolute().parents[1]))
    return None
