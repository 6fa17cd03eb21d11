"""Frappe (Baltrunas et al., arXiv 1505.03014): app usage in context, in the split of BARS' Frappe_x1.

`frappe.{train,validation,test}.libfm` of He and Chua (SIGIR 2017): per line a label (1 used, -1 drawn as a
negative) and ten one-hot fields `index:1`. The files know no time: each becomes a made-up day, in which a
row's number counts microseconds.
"""

from collections.abc import Iterator
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from recsys_dist.data.columns import TimestampUnit
from recsys_dist.data.sources import files
from recsys_dist.data.sources.protocol import Part, SourceConfig
from recsys_dist.data.sources.undated import SPLIT, TEST_US, TRAIN_US, VALID_US
from recsys_dist.data.split import Split
from recsys_dist.errors import SourceError
from recsys_dist.feature_kinds import Categorical
from recsys_dist.schema import Label, Schema

DAYS = {"frappe.train.libfm": TRAIN_US, "frappe.validation.libfm": VALID_US, "frappe.test.libfm": TEST_US}
CONTEXT = ["daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city"]
FIELDS = ["user_id", "item_id", *CONTEXT]  # in the order of the files; 957, 4082, 7, 7, 2, 3, 2, 9, 80, 233


class Config(SourceConfig):
    """Where the three files are."""

    kind: Literal["frappe"] = "frappe"
    path: str


class Source:
    """One part per file, each a day."""

    timestamp_unit: TimestampUnit = "us"

    def __init__(self, cfg: Config) -> None:
        self.cfg = cfg

    def schema(self) -> Schema:
        names = {"user_id": "user", "item_id": "item"}
        return Schema(
            features=tuple(Categorical(name=names.get(column, column), column=column) for column in FIELDS),
            labels=(Label(name="click"),),
            ranking_label="click",
            recall_positive=("click",),
        )

    def parts(self) -> list[Part]:
        return [Part(name, files.find(f"{self.cfg.path}/{name}", (".libfm",))[0].url) for name in DAYS]

    def read(self, part: Part) -> Iterator[pa.Table]:
        for chunk in files.csv_chunks(part.file, ["label", *FIELDS], " ", ["label", *FIELDS]):
            columns = {name: chunk[name] for name in chunk.column_names if name != "label"}
            for name in FIELDS:
                columns[name] = pc.replace_substring_regex(chunk[name], ":1$", "")
            columns["timestamp"] = pc.add(chunk["row"], DAYS[part.name])
            columns["click"] = pc.replace_substring_regex(chunk["label"], "^-1$", "0")
            yield pa.table(columns)

    def users(self) -> pa.Table | None:
        return None

    def items(self) -> pa.Table | None:
        return None

    def default_split(self) -> Split:
        return SPLIT


def recognise(given: str) -> Config | None:
    """The config for a directory of the three files."""
    cfg = Config(path=given)
    try:
        Source(cfg).parts()
    except SourceError:
        return None
    return cfg
