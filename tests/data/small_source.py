"""A source for tests: each Arrow file of a directory is a part; its first bytes tell whether it is whole."""

from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.ipc as ipc

from recsys_dist.data.columns import TimestampUnit
from recsys_dist.data.sources.protocol import Part, SourceConfig
from recsys_dist.errors import SourceError
from recsys_dist.schema import Schema
from tests.data import small_log

CHUNK = 40


class Config(SourceConfig):
    kind: Literal["small"] = "small"
    path: str
    fails: bool = False


class Source:
    timestamp_unit: TimestampUnit = "us"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def schema(self) -> Schema:
        return small_log.SCHEMA

    def parts(self) -> list[Part]:
        return [Part(file.name, str(file)) for file in sorted(Path(self.cfg.path).glob("*.arrow"))]

    def read(self, part: Part) -> Iterator[pa.Table]:
        assert not self.cfg.fails, "a bug in a source"
        try:
            with ipc.open_file(part.file) as reader:
                table = reader.read_all()
        except pa.ArrowInvalid as error:
            raise SourceError(f"{part.name}: {error}") from None
        for start in range(0, len(table), CHUNK):
            yield table.slice(start, CHUNK)

    def users(self) -> pa.Table | None:
        return small_log.users()

    def items(self) -> pa.Table | None:
        return small_log.items()

    def default_split(self) -> date | None:
        return None


def write_log(directory: Path, log: pa.Table, parts: int = 3) -> Config:
    """The log in `parts` files."""
    directory.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(np.array_split(np.arange(len(log)), parts)):
        table = log.take(pa.array(rows)).append_column("row", pa.array(np.arange(len(rows))))
        with ipc.new_file(directory / f"log-{number}.arrow", table.schema) as writer:
            writer.write_table(table)
    return Config(path=str(directory))
