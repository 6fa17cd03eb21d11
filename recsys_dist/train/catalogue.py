"""What a model is told of the items: the catalogue of a prepared data set, for the splits it trains on."""

from collections.abc import Iterable

import numpy as np
import torch

from recsys_dist.batch import Batch
from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import DataError
from recsys_dist.feature_kinds import IdFeature, Statistic
from recsys_dist.models.layers import table_rows
from recsys_dist.models.protocol import Catalogue
from recsys_dist.schema import Schema


def catalogue_of(prepared: Prepared, schema: Schema, splits: Iterable[str]) -> Catalogue:
    """Items with the features that `schema`, what the model reads, has of them, and counts of `splits`.

    Statistics of an item are no part of it: they change from day to day, and a catalogue has one value.
    Raises DataError for data of an older version, which lack columns.
    """
    items, rows = prepared.items, prepared.schema.item_id.rows
    assert rows is not None, "prepared data holds a fitted schema"
    at = items["row"].to_numpy()

    def column(name: str, kind: type) -> np.ndarray:
        if name not in items.column_names:
            raise DataError(
                f"items.parquet in {str(prepared.path)!r} has no column {name!r}: an older version "
                "prepared it; prepare the data again"
            )
        values: np.ndarray = np.zeros(rows, kind)
        values[at] = items[name].to_numpy()
        return values

    splits = tuple(splits)
    positives = sum(column(f"{split}_positives", np.int64) for split in splits)
    weight = sum(column(f"{split}_weight", np.float32) for split in splits)
    features = {
        f.name: torch.from_numpy(column(f.name, np.int32 if isinstance(f, IdFeature) else np.float32))
        for f in schema.features
        if schema.sides(f) == {"item"} and not isinstance(f, Statistic)
    }
    return Catalogue(torch.as_tensor(positives), features, torch.as_tensor(weight))


def occurrences(batches: Iterable[Batch], schema: Schema) -> dict[str, torch.Tensor]:
    """Table -> [its rows] int64: how many rows of the batches have each id, in whichever of its features."""
    by_table: dict[str, list[IdFeature]] = {}
    for feature in schema.ids:
        by_table.setdefault(schema.table(feature), []).append(feature)
    counts = {table: torch.zeros(table_rows(of[0]), dtype=torch.int64) for table, of in by_table.items()}
    for batch in batches:
        row_B = torch.arange(batch.rows)
        for table, of in by_table.items():
            found, rows = [batch.sparse[feature.name] for feature in of], len(counts[table])
            row_V = torch.cat([row_B.repeat_interleave(jagged.lengths()) for jagged in found])
            once = torch.unique(row_V * rows + torch.cat([jagged.values() for jagged in found]))
            counts[table] += torch.bincount(once % rows, minlength=rows)
    return counts
