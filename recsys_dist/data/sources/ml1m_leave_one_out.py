"""MovieLens-1M, each user's last film held out: the split of SASRec, BERT4Rec and gSASRec (RecSys 2023).

`splits/leave_one_out/` beside GroupLens' own files: `train_input.txt` has a line of films per user, in the
order of time; `test_output.txt` the last film of each; `val_output.txt` the last but one of 512 users, whose
lines of `val_input.txt` tell who they are. What comes between training and these is no example, and history
to all: the one rating of each user in `ratings.dat` that no file lists; where it lies before validation, as
those 512 users' does, models that learn every step of a sequence learn it as its last. Times are made up.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from recsys_dist.data.columns import TimestampUnit
from recsys_dist.data.sources import files, movielens
from recsys_dist.data.sources.protocol import Part, SourceConfig
from recsys_dist.data.sources.undated import SPLIT, TEST_US, VALID_US, chunks, word_lists
from recsys_dist.data.split import Split
from recsys_dist.data.transforms import HOUR_US
from recsys_dist.errors import SourceError
from recsys_dist.feature_kinds import Categorical, Sequence
from recsys_dist.schema import Label, Schema

FOLDER = "splits/leave_one_out"
TRAIN, VALID, TEST, REST = "train_input.txt", "val_output.txt", "test_output.txt", "ratings.dat"


class Config(SourceConfig):
    """The directory of MovieLens-1M, the length of sequences, and what is a training example."""

    kind: Literal["ml1m_leave_one_out"] = "ml1m_leave_one_out"
    path: str
    max_length: int = Field(200, ge=1, description="films of the sequence of the user's past")
    train_on: Literal["every", "last"] = Field(
        "every",
        description="every: each film of train_input is an example, with the sequence before it; last: each "
        "user's last one is, the others are its sequence, for models that learn every step of a sequence",
    )


class Source:
    """One part per file of events, and one for the ratings that no file lists."""

    timestamp_unit: TimestampUnit = "us"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.described = movielens.Source(movielens.Config(path=cfg.path))

    def schema(self) -> Schema:
        # `where` is None: all of them are films that she rated, and history rows have no label
        past = Sequence(name="films", of="item", max_length=self.cfg.max_length)
        return Schema(
            features=(
                Categorical(name="user", column="user_id"),
                Categorical(name="item", column="item_id"),
                past,
            ),
            labels=(Label(name="rated"),),
            ranking_label="rated",
            recall_positive=("rated",),
        )

    def parts(self) -> list[Part]:
        paths = {name: f"{self.cfg.path}/{FOLDER}/{name}" for name in (TRAIN, VALID, TEST)}
        paths[REST] = f"{self.cfg.path}/{REST}"
        return [Part(name, files.find(path, (".txt", ".dat"))[0].url) for name, path in paths.items()]

    def read(self, part: Part) -> Iterator[pa.Table]:
        split = _Published.read(files.local(self.cfg.path) / FOLDER)
        match part.name:
            case "train_input.txt":
                sizes = np.bincount(split.owner)
                left = np.repeat(np.cumsum(sizes), sizes) - np.arange(len(split.owner))  # 1 = her last film
                history = (left > 1) & (self.cfg.train_on == "last")
                events = _events(split.user_of(split.owner), split.train, VALID_US - 1 - left, history)
            case "val_output.txt":
                users = split.user_of(split.validated)
                events = _events(users, split.valid, np.full(len(users), VALID_US + HOUR_US))
            case "test_output.txt":
                events = _events(split.users, split.test, np.full(len(split.users), TEST_US))
            case _:
                events = split.rest(
                    pa.concat_tables(self.described.read(part), promote_options="default"), part.file
                )
        yield from chunks(events)

    def users(self) -> pa.Table | None:
        return self.described.users()

    def items(self) -> pa.Table | None:
        return self.described.items()

    def default_split(self) -> Split:
        return SPLIT


def recognise(given: str) -> Config | None:
    """The config for the directory of the split; that of MovieLens-1M itself is a log of `movielens`."""
    if Path(given, TRAIN).is_file() and Path(given).absolute().match(FOLDER):
        return Config(path=str(Path(given).absolute().parents[1]))
    return None


@dataclass(frozen=True)
class _Published:
    """The files of the split, by MovieLens' own ids. U users, in the order of train_input.txt; n films."""

    users: pa.Array  # [U] string
    films: pa.Array  # [F] string, all that the split knows
    owner: np.ndarray  # [n] whose film of `train` each is
    train: pa.Array  # [n] string, user by user, oldest first
    validated: np.ndarray  # [V] which users have a film in val_output.txt
    valid: pa.Array  # [V] string
    test: pa.Array  # [U] string

    @classmethod
    def read(cls, folder: Path) -> "_Published":
        """Raises SourceError where the files do not fit together."""
        paths = [str(folder / name) for name in (TRAIN, "val_input.txt", VALID, TEST)]
        train, val_input, valid, test = map(word_lists, paths)
        items, users = (_names(str(folder / f"sas_to_original_{of}.txt")) for of in ("items", "users"))
        numbers = pa.array(np.arange(1, len(train) + 1)).cast(pa.string())
        for url, rows, of in ((paths[2], len(valid), len(val_input)), (paths[3], len(test), len(train))):
            if rows != of:
                raise SourceError(f"{url}: {rows} lines, expected {of}, one for each line of the input")
        before = [" ".join(line[:-1]) for line in val_input.to_pylist()]
        lines = pc.binary_join(train, " ")
        at = pc.index_in(pa.array(before, pa.string()), value_set=lines)
        if at.null_count:
            line = np.flatnonzero(at.is_null())[0] + 1
            raise SourceError(f"{paths[1]}: line {line}, less its last film, is no line of {TRAIN}")
        films = [_renamed(pc.list_flatten(lists), items) for lists in (train, valid, test)]
        owner = pc.list_parent_indices(train).to_numpy()
        return cls(_renamed(numbers, users), items[1], owner, films[0], at.to_numpy(), films[1], films[2])

    def user_of(self, owner: np.ndarray) -> pa.Array:
        return self.users.take(pa.array(owner))

    def rest(self, ratings: pa.Table, url: str) -> pa.Table:
        """The rating of each user that no file lists, as history. Raises SourceError where it is not one."""
        pairs = [(self.user_of(self.owner), self.train), (self.user_of(self.validated), self.valid)]
        known = [self._key(user, film) for user, film in (*pairs, (self.users, self.test))]
        key = self._key(ratings["user_id"], ratings["item_id"])
        rest = np.flatnonzero((key >= 0) & ~np.isin(key, np.concatenate(known)))
        owner = key[rest] // len(self.films)
        count = np.bincount(owner, minlength=len(self.users))
        if (count != 1).any():
            user = int(np.argmax(count != 1))
            raise SourceError(
                f"{url}: user {self.users[user]} has {count[user]} ratings that no file of {FOLDER} lists, "
                "expected 1; take the files of one and the same MovieLens-1M"
            )
        # between training and what is held out: before validation where there is any, else before test
        at = np.where(np.isin(owner, self.validated), VALID_US - 1, VALID_US)
        found = ratings.take(pa.array(rest)).combine_chunks()
        events = _events(found["user_id"], found["item_id"], at, np.ones(len(at), bool))
        return events.set_column(events.schema.get_field_index("row"), "row", found["row"])

    def _key(self, user: pa.Array, film: pa.Array) -> np.ndarray:
        """[n] int64, one number for a user and a film; negative where either is none of the split's."""
        at = [
            pc.fill_null(pc.index_in(column, value_set=among), -1).to_numpy().astype(np.int64)
            for column, among in ((user, self.users), (film, self.films))
        ]
        return np.where((at[0] < 0) | (at[1] < 0), -1, at[0] * len(self.films) + at[1])


def _events(user: pa.Array, item: pa.Array, at_us: np.ndarray, history: np.ndarray | None = None) -> pa.Table:
    is_history = np.zeros(len(at_us), bool) if history is None else history
    return pa.table(
        {
            "user_id": user,
            "item_id": item,
            "timestamp": at_us,
            "history": is_history,
            "rated": pa.array(np.ones(len(at_us), np.int8), mask=is_history),
            "row": np.arange(len(at_us)),
        }
    )


def _names(url: str) -> tuple[pa.Array, pa.Array]:
    """Of lines `number id`: the numbers, and the ids."""
    lists = word_lists(url)
    if not pc.all(pc.equal(pc.list_value_length(lists), 2)).as_py():
        raise SourceError(f"{url}: every line must be two numbers, the split's and MovieLens' own")
    words = pc.list_flatten(lists)
    at = np.arange(0, len(words), 2)
    return words.take(pa.array(at)), words.take(pa.array(at + 1))


def _renamed(numbers: pa.Array, names: tuple[pa.Array, pa.Array]) -> pa.Array:
    """MovieLens' ids of the split's numbers; null where it has none, for `validate` to find."""
    return names[1].take(pc.index_in(numbers, value_set=names[0]))
