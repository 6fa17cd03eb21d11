"""A prepared data set made by hand: shards that a model can learn from, a manifest, a catalogue."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recsys_dist.config import rng_for
from recsys_dist.data.encoders import Encoders
from recsys_dist.data.prepared import MANIFEST, Manifest, ShardSet
from recsys_dist.data.vocab import Vocabulary
from tests.train import tiny

SPLITS = {"train": [400, 170, 300], "valid": [150, 51]}


def make(
    path: Path,
    bad_row: int | None = None,
    sizes_of: Mapping[str, list[int]] = SPLITS,
    table_rows: Mapping[str, int] = tiny.ROWS,
) -> Path:
    """`bad_row`: of the second training shard, whose `age` is NaN."""
    splits = {}
    for split, sizes in sizes_of.items():
        files = []
        for number, rows in enumerate(sizes):
            table = shard(split, number, rows, bad_row if (split, number) == ("train", 1) else None)
            for kind in ("ranking", "recall"):
                file = f"{kind}/{split}/part-{number:05d}.parquet"
                (path / file).parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(table, path / file)
            files.append(f"{split}/part-{number:05d}.parquet")
        for kind in ("ranking", "recall"):
            splits[f"{kind}/{split}"] = ShardSet(files=tuple(f"{kind}/{f}" for f in files), rows=tuple(sizes))
    users = user_rows()
    (path / "users/valid").mkdir(parents=True)
    pq.write_table(users, path / "users/valid/part-00000.parquet")
    splits["users/valid"] = ShardSet(files=("users/valid/part-00000.parquet",), rows=(len(users),))
    items = tiny.ROWS["item"] - 1
    pq.write_table(
        pa.table(
            {
                "item_id": [f"i{row}" for row in range(1, items + 1)],
                "row": pa.array(range(1, items + 1), pa.int32()),
                "train_positives": np.ones(items, np.int64),
                "valid_positives": np.ones(items, np.int64),
                "train_weight": np.ones(items, np.float32),
                "valid_weight": np.ones(items, np.float32),
                "item": pa.array(range(1, items + 1), pa.int32()),
                "length": rng_for(1, "items").normal(size=items).astype(np.float32),
            }
        ),
        path / "items.parquet",
    )
    manifest = Manifest(
        fingerprint=f"made by hand {bad_row}",
        schema_digest=tiny.schema(table_rows).digest(),
        vocabulary_digest="v",
        fitted_schema=tiny.schema(table_rows),
        config={},
        splits=splits,
        ledger={},
    )
    known = {
        name: Vocabulary(pa.array(values_of(name)), np.ones(rows - 1)) for name, rows in tiny.ROWS.items()
    }
    Encoders(tiny.schema(), known, {}, {}, {}, 0).save(path / "vocabulary")
    (path / MANIFEST).write_text(manifest.model_dump_json())
    return path


def values_of(name: str) -> list[str]:
    """Of the table `name`, in the order of its rows from 1 on."""
    return [f"{name[0]}{row}" for row in range(1, tiny.ROWS[name])]


def shard(split: str, number: int, rows: int, bad_row: int | None) -> pa.Table:
    rng = rng_for(1, split, number)
    user = rng.integers(1, tiny.ROWS["user"], rows).astype(np.int32)
    item = rng.integers(1, tiny.ROWS["item"], rows).astype(np.int32)
    age = rng.normal(size=rows).astype(np.float32)
    click = (rng.random(rows) < np.where(item % 2 == 0, 0.9, 0.1)).astype(np.float32)
    if bad_row is not None:
        age[bad_row] = np.nan
    lengths = rng.integers(0, 5, rows)
    return pa.table(
        {
            "user": user,
            "item": item,
            "history": lists(rng, lengths),
            "age": age,
            "length": rng.normal(size=rows).astype(np.float32),
            "click": click,
            "user_id": [f"u{row}" for row in user],
            "row_id": (np.int64(number) << 32) + np.arange(rows),
            "timestamp": pa.array(np.arange(rows) * 1_000_000, pa.timestamp("us", tz="UTC")),
        }
    )


def user_rows(users: int = 30) -> pa.Table:
    rng = rng_for(1, "users")
    return pa.table(
        {
            "user": rng.integers(1, tiny.ROWS["user"], users).astype(np.int32),
            "history": lists(rng, rng.integers(0, 5, users)),
            "age": rng.normal(size=users).astype(np.float32),
            "user_id": [f"u{row}" for row in range(users)],
            "truth": pa.array([[1 + row % 30, 31 + row % 5] for row in range(users)], pa.list_(pa.int32())),
            "seen": pa.array([[36, 37]] * users, pa.list_(pa.int32())),
        }
    )


def lists(rng: np.random.Generator, lengths: np.ndarray) -> pa.ListArray:
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int32)
    return pa.ListArray.from_arrays(offsets, rng.integers(1, tiny.ROWS["item"], offsets[-1]).astype(np.int32))
