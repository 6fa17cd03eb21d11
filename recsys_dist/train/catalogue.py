"""What a model is told of the items: the catalogue of a prepared data set, for the splits it trains on."""

from collections.abc import Iterable

import numpy as np
import torch

from recsys_dist.data.prepared import Prepared
from recsys_dist.errors import DataError
from recsys_dist.models.protocol import Catalogue
from recsys_dist.schema import IdFeature, Schema, Statistic


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
