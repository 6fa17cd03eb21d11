"""Gowalla (Cho et al., KDD 2011) as LightGCN, NGCF and BARS (Gowalla_m1) split it: `train.txt`, `test.txt`.

A line is a user and the items that she visited, sorted by their number: order and time are not known. So all
of a user's training items are the history of each one of them, less itself, in a random order; at test time
all of train.txt is. No validation items are published: some of each user's training items are drawn.
LightGCN's other data sets (yelp2018, amazon-book) come in the same format and can be read as well.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from recsys_dist.config import rng_for
from recsys_dist.data.columns import TimestampUnit
from recsys_dist.data.sources import files
from recsys_dist.data.sources.protocol import Part, SourceConfig
from recsys_dist.data.sources.undated import SPLIT, TEST_US, TRAIN_US, VALID_US, chunks, places, word_lists
from recsys_dist.data.split import Split
from recsys_dist.data.transforms import HOUR_US
from recsys_dist.feature_kinds import Categorical, Sequence
from recsys_dist.schema import Label, Schema

NOON_US = 12 * HOUR_US


class Config(SourceConfig):
    """Where the files are, how long histories are, and which part of the training items validates."""

    kind: Literal["gowalla"] = "gowalla"
    path: str
    max_length: int = Field(50, ge=1, description="items of the history, drawn where a user has more")
    valid_fraction: float = Field(0.1, gt=0, lt=1, description="of each user's training items, rounded")
    seed: int = Field(0, description="of the order of histories and of what validates")


@dataclass(frozen=True)
class _Visits:
    """n visits of a file: texts of user and item, what was drawn for each, and is it held out to validate?"""

    user: pa.Array
    item: pa.Array
    place: np.ndarray  # [n] int64, among the user's, in random order
    draw: np.ndarray  # [n] float64 in [0, 1)
    held: np.ndarray  # [n] bool


class Source:
    """train.txt is read twice: as visits to learn from, and as the history of these and of the test's."""

    timestamp_unit: TimestampUnit = "us"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def schema(self) -> Schema:
        visited = Sequence(
            name="visited", of="item", where="known", max_length=self.cfg.max_length, others_only=True
        )
        return Schema(
            features=(
                Categorical(name="user", column="user_id"),
                Categorical(name="item", column="item_id"),
                visited,
            ),
            labels=(Label(name="visit"), Label(name="known")),
            ranking_label="visit",
            recall_positive=("visit",),
            recall_repeats=True,  # each visit is in the history too
        )

    def parts(self) -> list[Part]:
        train, test = (
            files.find(f"{self.cfg.path}/{name}", (".txt",))[0].url for name in ("train.txt", "test.txt")
        )
        return [Part("train.txt as history", train), Part("train.txt", train), Part("test.txt", test)]

    def read(self, part: Part) -> Iterator[pa.Table]:
        visits = _visits(part.file, self.cfg)
        to_test = part.name == "test.txt"
        to_history = part.name == "train.txt as history"
        if to_history:  # what validates is known from validation's noon on: to test, not to validation
            at = np.where(visits.held, VALID_US + NOON_US, TRAIN_US) + visits.place
        elif to_test:
            at = np.full(len(visits.held), TEST_US)
        else:
            at = np.where(visits.held, VALID_US, TRAIN_US + NOON_US) + (visits.draw * HOUR_US).astype(
                np.int64
            )
        rows = len(at)
        yield from chunks(
            pa.table(
                {
                    "user_id": visits.user,
                    "item_id": visits.item,
                    "timestamp": at,
                    "history": pa.repeat(to_history, rows),
                    "visit": pa.nulls(rows, pa.int8()) if to_history else pa.repeat(1, rows),
                    "known": pa.repeat(int(to_history), rows),
                    "row": np.arange(rows),
                }
            )
        )

    def users(self) -> pa.Table | None:
        return None

    def items(self) -> pa.Table | None:
        return None

    def default_split(self) -> Split:
        return SPLIT


def recognise(given: str) -> Config | None:
    """The config for a directory with train.txt and test.txt, the first of which begins with numbers."""
    train, test = Path(given, "train.txt"), Path(given, "test.txt")
    if not (train.is_file() and test.is_file()):
        return None
    with train.open(encoding="ascii", errors="replace") as lines:
        words = lines.readline().split()
    return Config(path=given) if len(words) > 1 and all(word.isdecimal() for word in words) else None


def _visits(url: str, cfg: Config) -> _Visits:
    lists = word_lists(url)
    words = pc.list_flatten(lists)
    line = pc.list_parent_indices(lists).to_numpy()
    is_user = np.r_[True, line[1:] != line[:-1]][: len(line)]
    item, owner = words.filter(pa.array(~is_user)), (np.cumsum(is_user) - 1)[~is_user]
    rng = rng_for(cfg.seed, "gowalla")
    draw = rng.random(len(owner))
    # of each item one visit is always trained on: what no training day knows is never recommended
    code = np.asarray(item.dictionary_encode().indices)
    by_draw = np.argsort(draw)
    kept = by_draw[np.unique(code[by_draw], return_index=True)[1]]
    draw[kept] -= 1
    sizes = np.bincount(owner)[owner]
    held = (places(owner, draw) >= sizes - np.rint(cfg.valid_fraction * sizes)) & (draw >= 0)
    draw = rng.random(len(owner))
    user = words.filter(pa.array(is_user)).take(pa.array(owner))
    return _Visits(user, item, places(owner, draw), draw, held)
