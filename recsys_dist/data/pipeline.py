"""The only ray.data: raw logs → validated events → fitted encoders → shuffled training shards + manifest.

parts ─read, validate─▶ rows ─shuffle by user─▶ events/ ─count─▶ encoders
                                                   └─build─▶ examples ─shuffle─▶ ranking/ recall/ users/
"""

import datetime as dt
import json
import logging
import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray.data
from pydantic import Field, SerializeAsAny, field_validator
from ray.exceptions import RayTaskError
from tqdm import tqdm

from recsys_dist import __version__, session
from recsys_dist.config import Config, digest
from recsys_dist.data import encoders as fitting
from recsys_dist.data import identity, stages, transforms
from recsys_dist.data.counts import HISTORY, LATE_HISTORY, POSITIVE, TRAIN, VALID, Counts
from recsys_dist.data.encoders import Encoders
from recsys_dist.data.entities import Entities
from recsys_dist.data.examples import World
from recsys_dist.data.logs import Ledger, LogSpec
from recsys_dist.data.output import LOCK, PARTIALS, remove_partials, sole_writer, write_parquet, write_text
from recsys_dist.data.prepared import MANIFEST, Manifest, Prepared, ShardSet
from recsys_dist.data.sources.protocol import Source, SourceConfig, open_source, source_config
from recsys_dist.data.split import SPLITS, Split, check_split, choose_split, choose_valid
from recsys_dist.data.tasks import each
from recsys_dist.data.vocab import Admission
from recsys_dist.errors import ConfigError, DataError, QuarantineError, RecsysError, SourceError
from recsys_dist.feature_kinds import Bucketed, Categorical, Cross, Numeric, side
from recsys_dist.schema import Schema

FORMAT = 2  # of the prepared files; raise it when they change, so that old ones are made anew
EVENTS = "events.json"  # written when events/ is complete
RAW = "raw.json"  # what the raw files were like when they were last read whole


class PrepareConfig(Config):
    """What to prepare and how. Unset choices follow the source, or the log itself."""

    source: SerializeAsAny[SourceConfig]
    features: Schema | None = Field(None, description="schema to use instead of the source's own")
    valid_from: dt.date | None = Field(
        None, description="first validation day; default: the day before test, or days"
    )
    test_from: dt.date | None = Field(
        None, description="first test day; default: the source's protocol, or late days"
    )
    former: str | None = Field(
        None, description="prepared data, such as yesterday's, whose values keep their rows"
    )
    duplicates: str = Field("quarantine", pattern="^(quarantine|keep)$")
    max_quarantined: float = Field(
        0.1, ge=0, le=1, description="fraction of rows, and of parts, that may be refused"
    )
    buckets: int = Field(16, ge=1, description="groups of users, each handled by one task at a time")
    shard_rows: int = Field(65_536, ge=1, description="rows of a training shard, about")

    @field_validator("source", mode="before")
    @classmethod
    def _by_kind(cls, value: Any) -> Any:
        return source_config(value) if isinstance(value, dict) else value


def prepare(cfg: PrepareConfig, out: str | Path) -> Prepared:
    """Prepare a log in directory `out`, or return at once what is already there and unchanged.

    Raises SourceError (nothing readable), QuarantineError (too much refused), DataError, ConfigError.
    """
    quiet()
    if "://" in str(out):
        raise ConfigError(f"out {str(out)!r} is a URL; prepared data lie in a directory that all nodes share")
    path = Path(out).absolute()
    source = open_source(cfg.source)
    schema = cfg.features or source.schema()
    seen = identity.remembered(path / RAW)
    raw, now = identity.look(source, seen)
    settings, numbered = _settings(cfg, "former"), _numbered(cfg, path)
    fingerprint = digest([FORMAT, __version__, settings, schema.digest(), raw, *numbered])
    if not _whole(path, fingerprint) or now != seen:
        with sole_writer(path):
            if not _whole(path, fingerprint):  # another process may have made it meanwhile
                session.connect()
                events = _events(cfg, source, schema, path, raw)
                _make_examples(cfg, source, schema, path, events, fingerprint)
            write_text(json.dumps(now), path / RAW)
    return Prepared.open(path)


def _settings(cfg: PrepareConfig, *without: str) -> dict[str, Any]:
    """All others, but for where the log lies: that is known by its content, see `identity`."""
    return cfg.model_dump(mode="json", exclude={**dict.fromkeys(without, True), "source": {"path": True}})


def _numbered(cfg: PrepareConfig, path: Path) -> list[str]:
    """Digest of the vocabularies whose rows are kept, if any."""
    if cfg.former is None:
        return []
    if Path(cfg.former).resolve() == path.resolve():
        raise ConfigError(f"former={cfg.former!r} is where the new data go; give each day a directory")
    return [Prepared.open(cfg.former).manifest.vocabulary_digest]


def _events(cfg: PrepareConfig, source: Source, schema: Schema, path: Path, raw: str) -> dict[str, Any]:
    """What is known of `events/`, which is written unless it is there: other days or shards reuse it."""
    settings = _settings(cfg, "features", "valid_from", "test_from", "shard_rows", "former")
    fingerprint = digest([FORMAT, __version__, settings, repr(LogSpec.from_schema(schema)), raw])
    reused = _holds(path / EVENTS, fingerprint)
    _clear(path, keep_events=reused)
    if not reused:
        _write_events(cfg, source, schema, path, fingerprint)
    found: dict[str, Any] = json.loads((path / EVENTS).read_text())
    return found


def _make_examples(
    cfg: PrepareConfig, source: Source, schema: Schema, path: Path, found: dict[str, Any], fingerprint: str
) -> None:
    days = {dt.date.fromisoformat(text): rows for text, rows in found["days"].items()}
    split = _split(cfg, source, days)
    buckets = found["buckets"]
    counts = _count(path, buckets, schema, split)
    former = Prepared.open(cfg.former).encoders if cfg.former else None
    world, admissions = _fit(path, source, schema, counts, split, former)
    _write_catalogue(path, world, counts)
    shards = _build(path, buckets, world, split, _shard_counts(days, split, cfg.shard_rows))
    manifest = Manifest(
        fingerprint=fingerprint,
        schema_digest=world.encoders.schema.digest(),
        vocabulary_digest=world.encoders.digest(),
        fitted_schema=world.encoders.schema,
        config={**cfg.model_dump(mode="json"), "split": split.model_dump(mode="json")},
        splits=shards,
        ledger=found["ledger"],
        admissions=admissions,
        collisions=fitting.collisions(schema, counts, world.users, world.items),
    )
    _check_complete(manifest, days)
    write_text(manifest.model_dump_json(indent=1), path / MANIFEST)


def quiet() -> None:
    """Turn off Ray Data's own progress lines; the project draws its own."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its tracebacks come as exceptions anyway


def _write_events(cfg: PrepareConfig, source: Source, schema: Schema, path: Path, fingerprint: str) -> None:
    parts = source.parts()
    read = stages.ReadPart(source, LogSpec.from_schema(schema), path, cfg.buckets)
    names, keep = [part.name for part in parts], cfg.duplicates == "keep"

    def read_part(batch: dict[str, Any]) -> Iterator[pa.Table]:
        for number in batch["item"]:
            yield from read(int(number), parts[number])

    def write_bucket(table: pa.Table) -> Iterator[pa.Table]:
        yield pa.Table.from_pylist(list(stages.write_bucket(table, path, names, keep)))

    rows = ray.data.from_items(list(range(len(parts))), override_num_blocks=len(parts)).map_batches(
        read_part, batch_size=1
    )
    written = rows.repartition(cfg.buckets, keys=[stages.BUCKET]).map_batches(
        write_bucket, batch_format="pyarrow", batch_size=None
    )
    buckets = list(_watched(written.iter_rows(), "reading logs", cfg.buckets))
    ledger = Ledger.merge(
        Ledger.from_json(json.loads(file.read_text())) for file in sorted(path.glob("ledger/*.json"))
    ).with_duplicates(sum(row["duplicates"] for row in buckets))
    ledger.check()
    write_text(json.dumps(ledger.to_json(), indent=1), path / "ledger.json")
    _refuse_if_too_bad(cfg, ledger, len(parts), path)
    shutil.rmtree(path / "ledger")
    found = {
        "fingerprint": fingerprint,
        "buckets": sorted(row["bucket"] for row in buckets if row["kept"]),
        "days": dict(sum((Counter(json.loads(row["days"])) for row in buckets), Counter())),
        "ledger": ledger.to_json(),
    }
    write_text(json.dumps(found), path / EVENTS)


def _count(path: Path, buckets: list[int], schema: Schema, split: Split) -> Counts:
    rows = each(buckets, lambda bucket: stages.count_bucket(path, bucket, schema, split))
    return stages.merge_counts(list(_watched(rows.iter_rows(), "counting values", None)))


def _fit(
    path: Path, source: Source, schema: Schema, counts: Counts, split: Split, former: Encoders | None
) -> tuple[World, dict[str, Admission]]:
    users = Entities.of(source.users(), "user_id", counts.by_column["user_id"]["value"].unique())
    items = Entities.of(source.items(), "item_id", counts.by_column["item_id"]["value"].unique())
    freeze = (split.test_from - dt.date(1970, 1, 1)).days
    encoders, admissions = fitting.fit(schema, counts, users, items, freeze, former)
    encoders.save(path / "vocabulary")
    write_parquet(users.attributes, path / "entities/users.parquet")
    write_parquet(items.attributes, path / "entities/items.parquet")
    return World(encoders, users, items), admissions


def _write_catalogue(path: Path, world: World, counts: Counts) -> None:
    schema = world.encoders.schema
    vocabulary = world.encoders.vocabularies[schema.item_id.name]
    positions = world.items.positions(vocabulary.values)
    columns: dict[str, Any] = {
        "item_id": vocabulary.values,
        "row": pa.array(range(1, vocabulary.rows), pa.int32()),
    }

    def total(periods: tuple[str, ...], of: str) -> np.ndarray:
        totals = counts.totals("item_id", periods, of)
        at = pc.index_in(vocabulary.values, value_set=totals["value"].combine_chunks())
        return pc.fill_null(totals["total"].combine_chunks().take(at), 0).to_numpy()

    for period, also in ((TRAIN, HISTORY), (VALID, LATE_HISTORY)):
        columns[f"{period}_positives"] = total((period,), f"{POSITIVE}_sum").astype(np.int64)
        columns[f"{period}_exposures"] = total((period,), "rows").astype(np.int64)
        # recall learns from history rows too; that it leaves out what a user was shown before is not counted
        wanted, shown = total((period, also), f"{POSITIVE}_sum"), total((period, also), "rows")
        weight = wanted + schema.recall_exposure_weight * (shown - wanted)
        columns[f"{period}_weight"] = weight.astype(np.float32)
    for feature in schema.features:
        if isinstance(feature, Categorical | Bucketed | Numeric) and side(feature.column) == "item":
            columns[feature.name] = world.item_inputs[feature.name][positions]
        elif isinstance(feature, Cross) and schema.sides(feature) == {"item"}:
            columns[feature.name] = transforms.cross([columns[of] for of in feature.of], feature.hash_buckets)
    write_parquet(pa.table(columns), path / "items.parquet")


def _build(
    path: Path, buckets: list[int], world: World, split: Split, shards: dict[str, int]
) -> dict[str, ShardSet]:
    _ = world.user_inputs, world.item_inputs  # encoded once here, not in every task
    shared = ray.put(world)

    def build(bucket: int) -> pa.Table:
        return stages.build_bucket(path, bucket, ray.get(shared), split, shards)

    def write(table: pa.Table) -> Iterator[pa.Table]:
        yield pa.Table.from_pylist(list(stages.write_shards(table, path, shards)))

    total = sum(shards.values())
    written = each(buckets, build).repartition(total, keys=[stages.SHARD])
    rows = written.map_batches(write, batch_format="pyarrow", batch_size=None).iter_rows()
    made = sorted(_watched(rows, "building examples", None), key=lambda row: row["file"])
    sets = {
        name: _shard_set([r for r in made if r["split"] == name])
        for name in (*(f"ranking/{split}" for split in SPLITS), "recall/train", "recall/valid")
    }
    sequences = [
        f"sequences/{f.name}/{p}" for f in world.encoders.schema.item_sequences for p in stages.PHASES
    ]
    for name in ("users/valid", "users/test", *sequences):
        files = sorted((path / name).glob("part-*.parquet"))
        lengths = tuple(pq.read_metadata(file).num_rows for file in files)
        sets[name] = ShardSet(files=tuple(str(f.relative_to(path)) for f in files), rows=lengths)
    return sets


def _watched(rows: Iterable[dict[str, Any]], what: str, total: int | None) -> Iterator[dict[str, Any]]:
    """With a progress bar. An error of this project raised in a task is raised here as it was there.

    Ray passes an exception on only from generators, which all functions given to `map_batches` here
    are; from others nothing but its text arrives.
    """
    try:
        yield from tqdm(rows, desc=what, total=total, disable=None, unit="task", leave=False)
    except RayTaskError as error:
        if isinstance(error.cause, RecsysError):
            raise error.cause from None
        raise


def _split(cfg: PrepareConfig, source: Source, rows: dict[dt.date, int]) -> Split:
    test_from, valid_from = cfg.test_from, cfg.valid_from
    if test_from is None:
        published = source.default_split()
        test_from = published.test_from if isinstance(published, Split) else published
        valid_from = valid_from or (published.valid_from if isinstance(published, Split) else None)
    if not rows or (test_from is None and valid_from is None):
        return choose_split(rows)
    if test_from is None:
        raise ConfigError(
            "valid_from is set without test_from; set both, or neither to choose by the log's days"
        )
    if min(rows) >= test_from:
        raise ConfigError(f"test_from {test_from} leaves nothing to train on: the log begins on {min(rows)}")
    valid_from = valid_from or choose_valid(rows, test_from)
    split = Split.parse({"valid_from": valid_from, "test_from": test_from})
    check_split(split, list(rows))
    return split


def _shard_counts(days: dict[dt.date, int], split: Split, shard_rows: int) -> dict[str, int]:
    """Shards of each split: multiples of 8, so that 1, 2, 4 or 8 workers get equally many."""
    rows = dict.fromkeys(SPLITS, 0)
    assigned = split.assign(pa.array(list(days), pa.date32()))
    for which, count in zip(assigned, days.values(), strict=True):
        rows[SPLITS[which]] += count
    return {name: 8 * max(1, math.ceil(count / shard_rows / 8)) for name, count in rows.items()}


def _shard_set(made: list[dict[str, Any]]) -> ShardSet:
    kept = [row for row in made if row["rows"]]
    return ShardSet(
        files=tuple(row["file"] for row in kept),
        rows=tuple(row["rows"] for row in kept),
        first_event=min((row["first"] for row in kept), default=None),
        last_event=max((row["last"] for row in kept), default=None),
    )


def _refuse_if_too_bad(cfg: PrepareConfig, ledger: Ledger, parts: int, path: Path) -> None:
    if ledger.kept == 0:
        raise SourceError(f"no usable row in the log. {ledger.summary()}")
    for what, bad, of in (
        ("rows", ledger.quarantined.total(), ledger.read),
        ("files", len(ledger.refused), parts),
    ):
        if bad > cfg.max_quarantined * of:
            raise QuarantineError(
                f"{bad} of {of} {what} refused, over the limit max_quarantined={cfg.max_quarantined}. "
                f"{ledger.summary()} See {path / 'quarantine'}; mend the log, or raise the limit"
            )


def _check_complete(manifest: Manifest, days: dict[dt.date, int]) -> None:
    """Every kept row is trained on or held out."""
    placed = sum(manifest.splits[f"ranking/{name}"].total_rows for name in SPLITS)
    assert placed == sum(days.values()), f"{placed} examples written of {sum(days.values())} kept"
    for name in ("ranking/train", "ranking/valid", "ranking/test", "recall/train"):
        if not manifest.splits[name].total_rows:
            wanted = (
                f", or recall_positive={list(manifest.fitted_schema.recall_positive)}"
                if "recall" in name
                else ""
            )
            raise DataError(f"split {name!r} is empty; choose other days (valid_from, test_from){wanted}")


def _whole(path: Path, fingerprint: str) -> bool:
    """Is what these settings and raw files give already there, all of it?"""
    return _holds(path / MANIFEST, fingerprint) and Prepared.open(path).whole()


def _holds(file: Path, fingerprint: str | None = None) -> bool:
    """Is this a file of prepared data, of these settings and raw files where a fingerprint is given?"""
    try:
        values = json.loads(file.read_text()) if file.is_file() else None
    except ValueError:
        return False
    found = values.get("fingerprint") if isinstance(values, dict) else None
    return found is not None and fingerprint in (None, found)


def _clear(path: Path, keep_events: bool) -> None:
    """Remove what an earlier or unfinished preparation left; refuse a directory that holds anything else."""
    of_events = {EVENTS, "ledger.json", "ledger", "events", "quarantine"}
    made = {MANIFEST, "items.parquet", "vocabulary", "entities", "ranking", "recall", "sequences", "users"}
    names = [p.name for p in path.iterdir() if not p.match(PARTIALS)]
    foreign = sorted(set(names) - made - of_events - {LOCK, RAW})
    if (path / MANIFEST).exists() and not _holds(path / MANIFEST):
        foreign.append(MANIFEST)
    if foreign:
        raise DataError(
            f"{str(path)!r} holds {foreign[0]!r}, which is no prepared data; choose an empty directory"
        )
    remove_partials(path)
    (path / MANIFEST).unlink(missing_ok=True)  # first: from here on nothing half-removed is taken for whole
    if not keep_events:
        (path / EVENTS).unlink(missing_ok=True)
        made |= of_events
    for name in made:
        if (path / name).is_dir():
            shutil.rmtree(path / name)
        else:
            (path / name).unlink(missing_ok=True)
