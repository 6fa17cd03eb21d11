"""Arrow rows → Batch, column by column."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torchrec import KeyedJaggedTensor

from recsys_dist.batch import Batch
from recsys_dist.errors import DataError
from recsys_dist.feature_kinds import ListFeature
from recsys_dist.schema import Schema


def columns(schema: Schema) -> list[str]:
    """Columns of a training shard that `collate` reads for this schema."""
    names = [feature.name for feature in schema.features]
    return [*names, *(label.name for label in schema.labels), "row_id"]


def collate(table: pa.Table, schema: Schema) -> Batch:
    """A Batch of all rows of `table`, which has a column per feature of the fitted `schema`.

    Labels, `weight` (1 without it) and `row_id` are taken where the table has them. Raises DataError
    for an id outside its table, which a sharded lookup would silently read as row 0.
    """
    rows = len(table)
    present = set(table.column_names)
    dense = [_numpy(table[feature.name]) for feature in schema.dense]
    stacked = np.stack(dense, axis=1) if dense else np.empty((rows, 0), np.float32)
    row_id = _numpy(table["row_id"]) if "row_id" in present else np.full(rows, -1, np.int64)
    return Batch(
        dense=torch.from_numpy(stacked.astype(np.float32, copy=False)),
        sparse=_sparse(table, schema),
        labels={
            label.name: torch.from_numpy(_numpy(table[label.name]).astype(np.float32))
            for label in schema.labels
            if label.name in present
        },
        weight=torch.from_numpy(_numpy(table["weight"]).astype(np.float32))
        if "weight" in present
        else torch.ones(rows),
        row_id=torch.from_numpy(row_id.astype(np.int64)),
    )


def _sparse(table: pa.Table, schema: Schema) -> KeyedJaggedTensor:
    values, lengths = [], []
    for feature in schema.keys:
        column = table[feature.name]
        if isinstance(feature, ListFeature):
            lists = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
            ids = lists.flatten().to_numpy(zero_copy_only=False)
            lengths.append(pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False))
        else:
            ids = _numpy(column)
            lengths.append(np.ones(len(table), np.int32))
        if len(ids) and not 0 <= ids.min() <= ids.max() < (feature.rows or 0):
            bad = ids.max() if ids.min() >= 0 else ids.min()
            raise DataError(
                f"feature {feature.name!r}: id {bad} outside its table "
                f"of {feature.rows} rows; prepare the data again so that data and schema agree"
            )
        values.append(ids.astype(np.int32, copy=False))
    return KeyedJaggedTensor(
        keys=[feature.name for feature in schema.keys],
        values=torch.from_numpy(np.concatenate(values) if values else np.empty(0, np.int32)),
        lengths=torch.from_numpy(np.concatenate(lengths) if lengths else np.empty(0, np.int32)),
    )


def _numpy(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy()
