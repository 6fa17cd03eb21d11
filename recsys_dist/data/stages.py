"""The steps of preparation, each from one table or part to files; `pipeline` runs them in parallel.

Every file is written whole and named by what it holds, so a step that is run again after a kill
writes the same files and nothing half-written is ever read.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recsys_dist.data import logs, transforms
from recsys_dist.data.counts import Counts
from recsys_dist.data.examples import ORDER, RANKING, SPLIT, World, chunks, examples, sort_events, user_states
from recsys_dist.data.logs import Ledger, LogSpec
from recsys_dist.data.output import write_parquet, write_text
from recsys_dist.data.sources.protocol import Part, Source
from recsys_dist.data.split import SPLITS, Split
from recsys_dist.errors import SourceError
from recsys_dist.schema import Schema

BUCKET, SHARD, PART = "_bucket", "_shard", "_part"  # no feature, label or context is called so
PHASES = {"choose": "train", "refit": "valid"}  # of training: the last split that each learns from
ROW_BITS = 32  # row_id = number of the file << 32 | row within it


@dataclass(frozen=True)
class ReadPart:
    """Read and validate a part of a source: good rows go on, bad ones to `quarantine/`, sums to `ledger/`."""

    source: Source
    spec: LogSpec
    out: Path
    buckets: int

    def __call__(self, number: int, part: Part) -> Iterator[pa.Table]:
        ledger = Ledger()
        refused: list[pa.Table] = []
        try:
            for chunk in self.source.read(part):
                checked = logs.validate(chunk, self.spec, part.name, self.source.timestamp_unit)
                ledger = ledger.add(part.name, checked)
                refused.append(checked.quarantined)
                yield self._routed(checked.kept, checked.kept_row, number)
        except SourceError as error:
            ledger = ledger.refuse(part.name, str(error))
        if not refused:  # the shuffle needs the columns also of a part without rows
            yield self._routed(self.spec.arrow_schema().empty_table(), pa.array([], pa.int64()), number)
        if any(len(table) for table in refused):
            write_parquet(pa.concat_tables(refused), self.out / f"quarantine/part-{number:05d}.parquet")
        write_text(json.dumps(ledger.to_json()), self.out / f"ledger/part-{number:05d}.json")

    def _routed(self, kept: pa.Table, row: pa.Array, number: int) -> pa.Table:
        """Kept rows with where they came from and the bucket, which holds all events of a user."""
        bucket = (transforms.hash_text(kept["user_id"]) % np.uint64(self.buckets)).astype(np.int32)
        routed = kept.append_column(BUCKET, pa.array(bucket))
        routed = routed.append_column(PART, pa.array(np.full(len(bucket), number, np.int32)))
        return routed.append_column("row", row)


def write_bucket(
    events: pa.Table, out: Path, part_names: list[str], keep_duplicates: bool
) -> Iterator[dict[str, object]]:
    """Sort and deduplicate the buckets in `events`; write the canonical log, a file per day and bucket.

    Yields per bucket: rows `kept`, `duplicates` refused, and as JSON the examples by day.
    """
    for bucket in pc.unique(events[BUCKET]).to_pylist():
        # in the order of the files too, so that of rows that repeat each other the first read is kept
        order = [(name, "ascending") for name in ("user_id", "timestamp", "item_id", PART, "row")]
        chosen = events.filter(pc.equal(events[BUCKET], bucket)).drop_columns([BUCKET]).sort_by(order)
        repeated = logs.duplicates(chosen)
        if keep_duplicates:
            repeated[:] = False
        refused = chosen.filter(pa.array(repeated))
        if len(refused):
            _quarantine_duplicates(refused, part_names, out / f"quarantine/duplicates-{bucket:05d}.parquet")
        kept = chosen.filter(pa.array(~repeated)).drop_columns([PART, "row"])
        for day in pc.unique(kept["date"]).to_pylist():
            of_day = kept.filter(pc.equal(kept["date"], day)).drop_columns(["date"])
            write_parquet(of_day, out / f"events/date={day}/bucket-{bucket:05d}.parquet")
        examples_per_day = pc.value_counts(kept.filter(pc.invert(kept["history"]))["date"].cast(pa.string()))
        yield {
            "bucket": bucket,
            "kept": len(kept),
            "duplicates": len(refused),
            "days": json.dumps({row["values"]: row["counts"] for row in examples_per_day.to_pylist()}),
        }


def _quarantine_duplicates(repeated: pa.Table, part_names: list[str], path: Path) -> None:
    tables = []
    for number in pc.unique(repeated[PART]).to_pylist():
        rows = repeated.filter(pc.equal(repeated[PART], number)).drop_columns([PART])
        tables.append(logs.quarantine(rows, part_names[number], logs.DUPLICATE))
    write_parquet(pa.concat_tables(tables), path)


def bucket_numbers(out: Path) -> list[int]:
    """The buckets that the canonical log has events in."""
    files = out.glob("events/date=*/bucket-*.parquet")
    return sorted({int(file.stem.removeprefix("bucket-")) for file in files})


def read_bucket(out: Path, bucket: int) -> pa.Table:
    """All events of a bucket, sorted by user and time."""
    tables = []
    for file in sorted(out.glob(f"events/date=*/bucket-{bucket:05d}.parquet")):
        day = pa.scalar(file.parent.name.removeprefix("date=")).cast(pa.date32())
        table = pq.read_table(file, partitioning=None)
        tables.append(table.append_column("date", pa.repeat(day, len(table))))
    return sort_events(pa.concat_tables(tables, promote_options="default"))


def count_bucket(out: Path, bucket: int, schema: Schema, split: Split) -> pa.Table:
    """Counts of one bucket as rows `column, ipc`, for `merge_counts`."""
    counts = Counts.of(read_bucket(out, bucket), schema, split)
    return pa.table(
        {
            "column": pa.array(counts.by_column.keys()),
            "ipc": pa.array([_to_ipc(table) for table in counts.by_column.values()], pa.large_binary()),
        }
    )


def merge_counts(rows: list[dict[str, object]]) -> Counts:
    """The counts of all buckets from the rows that `count_bucket` gave."""
    return Counts.merge(
        Counts({str(row["column"]): pa.ipc.open_stream(row["ipc"]).read_all()}) for row in rows
    )


def build_bucket(out: Path, bucket: int, world: World, split: Split, shards: dict[str, int]) -> pa.Table:
    """Examples of one bucket with the shard each goes to.

    Its users' states, and the sequences to learn from at every position, are written on the way.
    """
    events = read_bucket(out, bucket)
    for feature in world.encoders.schema.item_sequences:
        for phase, until in PHASES.items():
            rows = chunks(events, world, split, feature, until)
            _write_shard(rows, out, f"sequences/{feature.name}/{phase}", bucket)
    for name in ("valid", "test"):
        states = user_states(events, world, split, name)
        write_parquet(states, out / f"users/{name}/part-{bucket:05d}.parquet")
    table = examples(events, world, split)
    per_split = np.array([shards[name] for name in SPLITS])
    first = np.r_[0, np.cumsum(per_split)[:-1]]
    which = np.asarray(table[SPLIT])
    order = np.asarray(table[ORDER])
    shard = first[which] + (order % per_split[which].astype(np.uint64)).astype(np.int64)
    return table.append_column(SHARD, pa.array(shard.astype(np.int32)))


def write_shards(table: pa.Table, out: Path, shards: dict[str, int]) -> Iterator[dict[str, object]]:
    """Shuffle the shards in `table` and write each: its rows for ranking, and those for recall."""
    for shard in pc.unique(table[SHARD]).to_pylist():
        rows = table.filter(pc.equal(table[SHARD], shard)).sort_by(ORDER)
        name = SPLITS[rows[SPLIT][0].as_py()]
        number = shard - sum(shards[s] for s in SPLITS[: SPLITS.index(name)])
        ranking, recall = rows[RANKING], pc.greater(rows["weight"], 0)
        rows = rows.drop_columns([SHARD, SPLIT, RANKING, ORDER])
        yield _write_shard(rows.filter(ranking).drop_columns(["weight"]), out, f"ranking/{name}", number)
        if name != "test":
            yield _write_shard(rows.filter(recall), out, f"recall/{name}", number)


def _write_shard(rows: pa.Table, out: Path, name: str, number: int) -> dict[str, object]:
    file = f"{name}/part-{number:05d}.parquet"
    row_id = (np.int64(number) << ROW_BITS) + np.arange(len(rows))
    write_parquet(rows.append_column("row_id", pa.array(row_id)), out / file)
    ends = pc.min_max(rows["timestamp"]).as_py() if len(rows) else {"min": None, "max": None}
    stamps = {key: str(value) if value else None for key, value in ends.items()}
    return {"split": name, "file": file, "rows": len(rows), "first": stamps["min"], "last": stamps["max"]}


def _to_ipc(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()
