"""Anyone's logs: Parquet or CSV files, whose columns a small YAML maps to the canonical ones.

    # log.yaml; paths are relative to it, or URLs (s3://, gs://, any that fsspec knows)
    kind: parquet
    events: events/              # files, directories or globs; hive partitions (day=2024-05-01/) are columns
    users: {path: users.parquet, id: uid}
    items: {path: items.csv, id: sku}
    columns:
      user_id: uid
      item_id: sku
      timestamp: ts
      labels:
        click: is_click                                  # 0/1
        watch_ms: {column: play_time, kind: value}       # an amount
        like: {column: stars, at_least: 4}               # 1 from a threshold on
      context: {tab: page}                               # what is known when the item is shown
    timestamp_unit: ms                                   # s, ms, us, ns or iso; timestamp types know theirs

What the features are is derived from the columns unless `features` lists them (see schema.py).
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BeforeValidator, Field

from recsys_dist.config import Config as BaseConfig
from recsys_dist.config import load_yaml
from recsys_dist.data.columns import TimestampUnit, flat, numbers, texts
from recsys_dist.data.logs import MALFORMED
from recsys_dist.data.sources import files
from recsys_dist.data.sources.protocol import Part, SourceConfig
from recsys_dist.errors import ConfigError, SourceError
from recsys_dist.feature_kinds import (
    AnyFeature,
    Bucketed,
    Categorical,
    Numeric,
    Sequence,
    Statistic,
    Time,
    side,
)
from recsys_dist.schema import RESERVED, Label, Schema

PART_BYTES = 256 << 20  # larger Parquet files are read as several parts
CATEGORIES = 1_000  # an integer attribute with more distinct values is taken as a number
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"


class LabelColumn(BaseConfig):
    """A column of outcomes: 0/1, with `at_least` 1 from that value on, or an amount."""

    column: str
    kind: Literal["binary", "value"] = "binary"
    at_least: float | None = None


class Table(BaseConfig):
    """A file of users or items, one row each; `id` is the column that the events refer to."""

    path: str
    id: str


def _as_column(value: Any) -> Any:
    return {"column": value} if isinstance(value, str) else value


def _as_mapping(value: Any) -> Any:
    return {name: name for name in value} if isinstance(value, list | tuple) else value


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Columns(BaseConfig):
    """Canonical name -> the name in the files."""

    user_id: str = "user_id"
    item_id: str = "item_id"
    timestamp: str = "timestamp"
    date: str | None = Field(default=None, description="the log's own local day, where it states one")
    history: str | None = Field(default=None, description="1 = context of later events, no example")
    labels: dict[str, Annotated[LabelColumn, BeforeValidator(_as_column)]] = Field(min_length=1)
    context: Annotated[dict[str, str], BeforeValidator(_as_mapping)] = Field(default_factory=dict)


class Config(SourceConfig):
    """Where the files are and what their columns mean."""

    kind: Literal["parquet"] = "parquet"
    events: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(min_length=1)
    users: Table | None = None
    items: Table | None = None
    columns: Columns
    timestamp_unit: TimestampUnit = "s"
    utc_offset_hours: float = Field(default=0.0, ge=-12, le=14)
    features: tuple[AnyFeature, ...] | None = None
    ranking_label: str | None = Field(default=None, description="default: the first binary label")
    recall_positive: tuple[str, ...] | None = Field(default=None, description="default: the ranking label")
    recall_exposure_weight: float = Field(
        default=0.0, ge=0, le=1, description="in recall training, of events that are no positives"
    )
    recall_repeats: bool = Field(default=False, description="learn to recall items shown before, too")


class Source:
    """One part per file, or several for a large Parquet file."""

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg
        self.timestamp_unit: TimestampUnit = cfg.timestamp_unit

    def schema(self) -> Schema:
        labels = [Label(name=name, kind=label.kind) for name, label in self.cfg.columns.labels.items()]
        first = next((label.name for label in labels if label.kind == "binary"), None)
        ranking = self.cfg.ranking_label or first
        if ranking is None:
            raise ConfigError("columns.labels has no binary label; give one, by `at_least` if need be")
        positive = self.cfg.recall_positive or (ranking,)
        taken = {label.name for label in labels} | RESERVED
        features = self.cfg.features or _renamed(_derived(self, ranking, positive), taken)
        return Schema.parse(
            {
                "features": [feature.model_dump() for feature in features],
                "labels": [label.model_dump() for label in labels],
                "ranking_label": ranking,
                "recall_positive": positive,
                "recall_exposure_weight": self.cfg.recall_exposure_weight,
                "recall_repeats": self.cfg.recall_repeats,
                "utc_offset_hours": self.cfg.utc_offset_hours,
            }
        )

    def parts(self) -> list[Part]:
        return [part for file in self._files() for part in _parts(file)]

    def read(self, part: Part) -> Iterator[pa.Table]:
        wanted = self._wanted()
        partitions = _partitions(part.file)
        have = files.columns_of(part.file).names
        files.require(part.file, wanted.values(), [*have, *partitions])
        columns = sorted({name for name in wanted.values() if name in have})
        if files.is_parquet(part.file):
            chunks = files.parquet_chunks(part.file, columns, part.first, part.last)
        else:
            chunks = files.csv_chunks(part.file, columns)
        for chunk in chunks:
            yield self._canonical(chunk, wanted, partitions)

    def users(self) -> pa.Table | None:
        return self._described(self.cfg.users, "user_id")

    def items(self) -> pa.Table | None:
        return self._described(self.cfg.items, "item_id")

    def default_split(self) -> date | None:
        return None

    def _files(self) -> list[files.File]:
        found = [f for pattern in self.cfg.events for f in files.find(pattern, files.PARQUET + files.CSV)]
        return list({f.url: f for f in found}.values())

    def _wanted(self) -> dict[str, str]:
        """Canonical column -> column of the files; a feature's context column maps to itself by default."""
        columns = self.cfg.columns
        wanted = {name: getattr(columns, name) for name in ("user_id", "item_id", "timestamp")}
        wanted |= {name: given for name in ("date", "history") if (given := getattr(columns, name))}
        wanted |= {name: label.column for name, label in columns.labels.items()}
        for feature in self.cfg.features or ():
            column = feature.key if isinstance(feature, Statistic) else getattr(feature, "column", "user_id")
            if side(column) == "context":
                wanted.setdefault(column, column)
        return wanted | columns.context

    def _canonical(
        self, chunk: pa.Table, wanted: dict[str, str], partitions: dict[str, str | None]
    ) -> pa.Table:
        found: dict[str, pa.Array | pa.ChunkedArray] = {}
        for name, column in wanted.items():
            label = self.cfg.columns.labels.get(name)
            if column not in chunk.column_names:
                found[name] = pa.repeat(pa.scalar(partitions[column], pa.string()), len(chunk))
            elif label is not None and label.at_least is not None:
                found[name] = _from_threshold(flat(chunk[column], column), label.at_least)
            else:
                found[name] = chunk[column]
        rest = [name for name in ("row", MALFORMED) if name in chunk.column_names]
        return pa.table(found | {name: chunk[name] for name in rest})

    def _described(self, table: Table | None, key: str) -> pa.Table | None:
        if table is None:
            return None
        prefix = f"{key.removesuffix('_id')}s."
        used = [f for f in self.schema().features if isinstance(f, Numeric | Bucketed)]
        numeric = [f.column.removeprefix(prefix) for f in used if f.column.startswith(prefix)]
        file = files.find_one(table.path, files.PARQUET + files.CSV)
        return files.described(files.read_table(file.url), table.id, key, numeric, file.url)


def recognise(given: str) -> Config | None:
    """The config in a YAML file, or in `log.yaml` of a directory; its paths are relative to that file."""
    path = files.local(given)
    path = path / "log.yaml" if path.is_dir() else path
    if not path.is_file() or path.suffix not in (".yaml", ".yml"):
        return None
    values = load_yaml(path)
    for name in ("events", "users", "items"):
        values[name] = _relative_to(path.absolute().parent, values.get(name))
    return Config.parse({name: value for name, value in values.items() if value is not None})


def _relative_to(base: Path, value: Any) -> Any:
    match value:
        case str():
            return value if files.URL.match(value) else str(base / files.local(value))
        case list():
            return [_relative_to(base, entry) for entry in value]
        case {"path": path, **rest}:
            return {"path": _relative_to(base, path), **rest}
        case _:
            return value


def _parts(file: files.File) -> Iterable[Part]:
    whole = Part(file.url, file.url)
    if not files.is_parquet(file.path) or file.bytes <= PART_BYTES:
        return [whole]
    try:
        groups = files.row_groups(file.url)
    except SourceError:  # `read` meets it again, and then it counts against this file only
        return [whole]
    pieces = min(groups, -(-file.bytes // PART_BYTES))
    bounds = np.linspace(0, groups, pieces + 1).round().astype(int).tolist()
    return [Part(f"{file.url} [row groups {a}-{b - 1}]", file.url, a, b) for a, b in pairwise(bounds)]


def _partitions(url: str) -> dict[str, str | None]:
    """Hive partition values in the directories of a path: `.../day=2024-05-01/part-0.parquet`."""
    pairs = [piece.partition("=") for piece in url.split("?")[0].split("/")[:-1] if "=" in piece]
    return {name: None if value == HIVE_NULL else unquote(value) for name, _, value in pairs}


def _from_threshold(array: pa.Array, at_least: float) -> pa.Array:
    """0/1 as text; what is no number stays as it is, for `validate` to refuse."""
    parsed = numbers(array)
    reached = pc.if_else(pa.array(parsed.values >= at_least), "1", "0")
    return pc.if_else(pa.array(parsed.missing), None, pc.if_else(pa.array(parsed.bad), texts(array), reached))


def _derived(source: Source, ranking: str, positive: tuple[str, ...]) -> Iterator[AnyFeature]:
    """Features for a log that nobody has described: ids, attributes by type, time, sequences, rates."""
    yield Categorical(name="user", column="user_id")
    yield Categorical(name="item", column="item_id")
    yield Time(name="hour", part="hour")
    yield Time(name="weekday", part="weekday")
    types = _types(source._files())
    for name, column in source.cfg.columns.context.items():
        numeric = types.names.count(column) == 1 and pa.types.is_floating(types.field(column).type)
        kind = Numeric if numeric else Categorical
        yield kind(name=f"context_{_slug(name)}", column=name)
    yield from _attributes(source.cfg.users, "users")
    yield from _attributes(source.cfg.items, "items")
    for label in positive:
        yield Sequence(name=f"past_{_slug(label)}", of="item", where=label)
    yield Sequence(name="past_events", of="item")
    for name, key in (("user", "user_id"), ("item", "item_id")):
        yield Statistic(name=f"{name}_count", key=key)
        yield Statistic(name=f"{name}_rate", key=key, label=ranking)


def _types(found: list[files.File]) -> pa.Schema:
    """Columns of the first file that can be read; the others, `read` refuses and names."""
    for file in found:
        with suppress(SourceError):
            return files.columns_of(file.url)
    return pa.schema([])


def _renamed(features: Iterable[AnyFeature], taken: set[str]) -> tuple[AnyFeature, ...]:
    """Features whose names differ from each other and from those taken (users may have a column `id`)."""
    result: list[AnyFeature] = []
    for feature in features:
        name = feature.name
        while name in taken:
            name += "_2"
        taken.add(name)
        result.append(feature.override([f"name={name}"]))
    return tuple(result)


def _attributes(table: Table | None, prefix: str) -> Iterator[AnyFeature]:
    """Floats and wide integers are numbers, other values categories; lists, times and titles are left out."""
    if table is None:
        return
    file = files.find_one(table.path, files.PARQUET + files.CSV)
    types, values = files.columns_of(file.url), files.read_table(file.url)
    files.require(file.url, [table.id], types.names)
    for name in types.names:
        kind = types.field(name).type
        if name == table.id or pa.types.is_nested(kind) or pa.types.is_temporal(kind):
            continue
        distinct = len(pc.unique(flat(values[name], name)))
        feature, column = f"{prefix[:-1]}_{_slug(name)}", f"{prefix}.{name}"
        wide = pa.types.is_integer(kind) and distinct > CATEGORIES and not name.lower().endswith("id")
        if pa.types.is_floating(kind) or wide:
            low = numbers(flat(values[name], name)).values
            yield Numeric(name=feature, column=column, log=wide and not (low < 0).any())
        elif distinct < max(len(values), 2):  # otherwise it names the row, as a title does
            yield Categorical(name=feature, column=column)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "column"
