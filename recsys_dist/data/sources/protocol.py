"""What a source is: one file under `sources/` with a frozen `Config`, a class `Source` and `recognise`.

A source turns raw files into canonical *columns*; it does not judge values. `data.logs.validate`
does, row by row, so that a bad value costs its row and not the file. `data.pipeline` calls
`read(part)` in parallel Ray Data tasks; a source itself knows nothing of Ray.
"""

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Protocol

import pyarrow as pa

import recsys_dist.data.sources
from recsys_dist.config import Config, nearest
from recsys_dist.data.columns import TimestampUnit
from recsys_dist.data.split import Split
from recsys_dist.errors import ConfigError, SourceError
from recsys_dist.schema import Schema

CHUNK_ROWS = 65_536  # rows of a table that `read` yields, about: tens of MB, whatever the file's size


class SourceConfig(Config):
    """Base of every source's Config; `kind` is the file that it lives in."""

    kind: str


@dataclass(frozen=True)
class Part:
    """An independent unit of reading, small and picklable.

    name    what a person would call it, unique in the source: a file, a file's row groups, a block
    file    path or URL; empty where nothing is read (the simulator)
    first   first row group, byte or block; what it counts is the source's own affair
    last    one past the last; -1 = to the end of the file
    """

    name: str
    file: str = ""
    first: int = 0
    last: int = -1


class Source(Protocol):
    """What the pipeline asks of every source. Built as `Source(cfg)`, which reads no file."""

    timestamp_unit: TimestampUnit
    """How numbers and text in `timestamp` are meant; a column of a timestamp type says so itself."""

    def schema(self) -> Schema:
        """The source's own default features and labels."""
        ...

    def parts(self) -> list[Part]:
        """Every part of the log, in a fixed order; at least one.

        Raises SourceError where a path does not exist or nothing matches it. A file that exists but
        is corrupt becomes a part like any other: `read` raises for it, and only it is refused.
        """
        ...

    def read(self, part: Part) -> Iterator[pa.Table]:
        """Chunks of about CHUNK_ROWS rows, streamed.

        Canonical names (`user_id`, `item_id`, `timestamp`, label and context columns of the schema;
        where the source has them `date`, `history`, `bayes_probability`), raw types as found in the
        file, and `row: int64`, the row's number within the file (from 0, the header not counted).
        The same part gives the same rows each time. Raises SourceError, possibly after some chunks,
        where the file is truncated, corrupt or lacks a column.
        """
        ...

    def users(self) -> pa.Table | None:
        """`user_id: string` (unique) and attributes, or None. Raises SourceError."""
        ...

    def items(self) -> pa.Table | None:
        """`item_id: string` (unique) and attributes, or None. Raises SourceError."""
        ...

    def default_split(self) -> Split | date | None:
        """The published protocol's first days of validation and test, its first test day alone where
        it says nothing of validation, or None where there is none."""
        ...


def source_names() -> list[str]:
    """Every file of `sources/` that defines `Config` and `Source`."""
    names = [m.name for m in pkgutil.iter_modules(recsys_dist.data.sources.__path__)]
    return [n for n in names if n not in ("protocol", "files", "undated")]


def source_module(name: str) -> ModuleType:
    """The module of a source, by its name; ConfigError names the nearest where there is none."""
    if name not in source_names():
        raise ConfigError(f"source {name!r} does not exist{nearest(name, source_names())}")
    return importlib.import_module(f"recsys_dist.data.sources.{name}")


def source_config(values: dict[str, object]) -> SourceConfig:
    """The validated Config of the source that `values["kind"]` names; raises ConfigError."""
    kind = values.get("kind")
    if not isinstance(kind, str):
        raise ConfigError(f"a source needs `kind`, one of {', '.join(source_names())}; given: {values!r:.80}")
    config: type[SourceConfig] = source_module(kind).Config
    return config.parse(values)


def source_for(given: str) -> SourceConfig:
    """The config of the source that knows what lies at a path (each source has a `recognise`).

    Raises SourceError where none does, saying what there is and what each expects.
    """
    for name in source_names():
        found: SourceConfig | None = source_module(name).recognise(given)
        if found is not None:
            return found
    exists = Path(given).exists()
    raise SourceError(
        f"{given}: {'no log that a source knows is here' if exists else 'does not exist'}; expected a "
        f"directory of KuaiRand (log_standard_*.csv) or MovieLens (ratings.dat, ratings.csv) files, or "
        f"a YAML file that maps your own (docs/own_logs.md), as log.yaml in that directory"
    )


def open_source(cfg: SourceConfig) -> Source:
    """The source that `cfg` configures; reads no file yet."""
    source: Source = source_module(cfg.kind).Source(cfg)
    return source
