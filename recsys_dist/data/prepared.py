"""A prepared data set on disk: where its files are and what its manifest says."""

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from recsys_dist.config import Config
from recsys_dist.data.encoders import Encoders
from recsys_dist.data.vocab import Admission
from recsys_dist.errors import DataError
from recsys_dist.schema import Schema

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"


class ShardSet(Config):
    """Files of one folder, relative to the data set, with the rows of each and the time they span."""

    files: tuple[str, ...]
    rows: tuple[int, ...]
    first_event: str | None = None
    last_event: str | None = None

    @property
    def total_rows(self) -> int:
        return sum(self.rows)


class Manifest(Config):
    """Written last, so that a directory without one is not a data set."""

    fingerprint: str  # of the configuration and the raw files: the same again means nothing to do
    schema_digest: str
    vocabulary_digest: str
    fitted_schema: Schema
    config: dict[str, Any]
    splits: dict[str, ShardSet]  # "ranking/train", "sequences/clicked/refit", "users/test", ...
    ledger: dict[str, Any]
    # feature with a vocabulary -> how many of the values that training has seen have a row
    admissions: dict[str, Admission] = Field(default_factory=dict)
    # hashed feature -> share of its values that share a row with others
    collisions: dict[str, float] = Field(default_factory=dict)

    @property
    def data_digest(self) -> str:
        """Identity of the prepared rows for trackers: same raw files, same configuration."""
        return self.fingerprint


@contextlib.contextmanager
def readable(file: str | Path) -> Iterator[None]:
    """DataError, which names the file that is read within, where it is missing or torn."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: torn JSON, and as pa.ArrowInvalid torn Parquet
        said = " ".join(str(error).split())  # pyarrow's has lines
        raise DataError(f"{str(file)!r} cannot be read: {said}; prepare again") from None


@dataclass(frozen=True)
class Prepared:
    """An opened data set. `Prepared.open` raises DataError for a directory that is not one."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, path: str | Path) -> "Prepared":
        file = Path(path) / MANIFEST
        if not file.is_file():
            raise DataError(
                f"{str(path)!r} holds no prepared data ({MANIFEST} is missing); "
                "make it with: python -m jobs.prepare"
            )
        with readable(file):
            values = json.loads(file.read_text())
        return cls(Path(path), Manifest.parse(values))

    @property
    def schema(self) -> Schema:
        return self.manifest.fitted_schema

    def shards(self, name: str) -> ShardSet:
        """The files of a split such as `"ranking/train"`; DataError names those there are."""
        if name not in self.manifest.splits:
            known = ", ".join(sorted(self.manifest.splits))
            raise DataError(f"prepared data {str(self.path)!r} has no split {name!r}; it has: {known}")
        return self.manifest.splits[name]

    def files(self, name: str) -> list[str]:
        """Absolute paths of a split's files."""
        return [str(self.path.resolve() / file) for file in self.shards(name).files]

    def whole(self) -> bool:
        """Whether each file of examples is there with the rows that it should have; warns of the first."""
        for name, shards in self.manifest.splits.items():
            for file, rows in zip(self.files(name), shards.rows, strict=True):
                try:
                    with readable(file):
                        found = pq.read_metadata(file).num_rows
                except DataError:
                    found = -1
                if found != rows:
                    log.warning("%s is damaged or missing, and prepared again", file)
                    return False
        return True

    def extremes(self, name: str, column: str) -> tuple[Any, Any]:
        """Least and greatest value of a split's column, from its files' footers; None where there is none."""
        found = []
        for file in self.files(name):
            with readable(file):
                footer = pq.read_metadata(file)
            at = footer.schema.names.index(column)
            groups = [footer.row_group(group).column(at).statistics for group in range(footer.num_row_groups)]
            found += [(group.min, group.max) for group in groups if group is not None and group.has_min_max]
        least, greatest = zip(*found, strict=True) if found else ((None,), (None,))
        return min(least), max(greatest)

    @cached_property
    def items(self) -> pa.Table:
        """The catalogue in table-row order from row 1: `item_id, row, train_positives, ...`."""
        file = self.path / "items.parquet"
        with readable(file):
            return pq.read_table(file)

    @cached_property
    def encoders(self) -> Encoders:
        with readable(self.path / "vocabulary"):
            return Encoders.load(self.path / "vocabulary")
