"""Preparation from end to end on Ray: nothing lost, the same result however it came about."""

import datetime as dt
import hashlib
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import ray
import ray.data

from jobs.command import reported
from jobs.prepare import summary
from recsys_dist import session
from recsys_dist.data import pipeline
from recsys_dist.data.examples import sort_events
from recsys_dist.data.pipeline import PrepareConfig, prepare
from recsys_dist.data.prepared import Prepared
from recsys_dist.data.split import Split
from recsys_dist.errors import ConfigError, DataError, SourceError
from recsys_dist.feature_kinds import Categorical
from tests.data import small_log
from tests.data.small_source import Config, Source, write_log

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
SPLITS = ("train", "valid", "test")


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    session.connect(cpus=2)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def small_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "open_source", Source)


@pytest.fixture(scope="module")
def log() -> pa.Table:
    """With a few rows twice, one without a user, and one with an impossible label."""
    rows = small_log.events()
    rows = pa.concat_tables([rows, rows.slice(10, 4)])
    users = ["" if n == 3 else user for n, user in enumerate(rows["user_id"].to_pylist())]
    likes = [7 if n == 5 else like for n, like in enumerate(rows["like"].to_pylist())]
    rows = rows.set_column(rows.column_names.index("user_id"), "user_id", pa.array(users))
    return rows.set_column(rows.column_names.index("like"), "like", pa.array(likes, pa.int8()))


@pytest.fixture(scope="module")
def source(log: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Config:
    return write_log(tmp_path_factory.mktemp("log"), log)


def config(source: Config, **settings: Any) -> PrepareConfig:
    return PrepareConfig(source=source, **{"buckets": 4, "shard_rows": 20, **settings})


@pytest.fixture(scope="module")
def prepared(source: Config, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "open_source", Source)
        return prepare(config(source), tmp_path_factory.mktemp("prepared"))


def digests(directory: Path, *below: str) -> dict[str, str]:
    """File by file, all but the lock."""
    files = [f for name in below or (".",) for f in (directory / name).rglob("*") if f.is_file()]
    return {
        str(f.relative_to(directory)): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in files
        if f.name != ".lock"
    }


def rows_of(prepared: Prepared, name: str) -> list[dict[str, Any]]:
    return [row for file in prepared.files(name) for row in pq.read_table(file).to_pylist()]


def key(row: dict[str, Any]) -> tuple[str, str, dt.datetime]:
    return row["user_id"], row["item_id"], row["timestamp"]


def usable(log: pa.Table) -> list[dict[str, Any]]:
    """Rows that are no fault and no repetition, in plain Python."""
    seen: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in log.to_pylist():
        if row["user_id"] and row["like"] in (0, 1):
            seen.setdefault((*key(row), row["history"]), row)
    return list(seen.values())


def test_every_row_is_an_example_once_or_quarantined(prepared: Prepared, log: pa.Table) -> None:
    ledger = json.loads((prepared.path / "ledger.json").read_text())
    kept = usable(log)
    assert ledger["read"] == len(log) == ledger["kept"] + sum(ledger["quarantined"].values())
    assert ledger["kept"] == len(kept)
    quarantined = [
        r for f in (prepared.path / "quarantine").glob("*.parquet") for r in pq.read_table(f).to_pylist()
    ]
    assert Counter(r["reason"] for r in quarantined) == ledger["quarantined"]
    assert ledger["quarantined"]["user_id is missing"] == ledger["quarantined"]["like is not 0 or 1"] == 1
    days = sorted({row["date"] for row in kept if not row["history"]})
    split = prepared.manifest.config["split"]
    assert split == {"valid_from": str(days[-2]), "test_from": str(days[-1])}
    for index, name in enumerate(SPLITS):
        of_split = [
            r for r in kept if not r["history"] and (r["date"] >= days[-2]) + (r["date"] >= days[-1]) == index
        ]
        assert Counter(map(key, rows_of(prepared, f"ranking/{name}"))) == Counter(map(key, of_split))


def test_it_is_told_how_many_values_share_a_row(prepared: Prepared) -> None:
    [(name, share)] = prepared.manifest.collisions.items()
    assert name == "device" and f"'device' is hashed: {share:.1%} of its values share a row" in summary(
        prepared
    )


def test_recall_learns_from_first_encounters_of_training_days(prepared: Prepared, log: pa.Table) -> None:
    start = dt.date.fromisoformat(prepared.manifest.config["split"]["valid_from"])
    in_time = sorted(usable(log), key=lambda r: r["timestamp"])
    first = {(r["user_id"], r["item_id"]): r for r in reversed(in_time)}
    wanted = [r for r in first.values() if r["date"] < start and (r["click"] or r["like"])]
    assert Counter(map(key, rows_of(prepared, "recall/train"))) == Counter(map(key, wanted))


def test_sequences_hold_the_events_of_training_as_targets_once(prepared: Prepared, log: pa.Table) -> None:
    split = prepared.manifest.config["split"]
    for phase, end in (("choose", split["valid_from"]), ("refit", split["test_from"])):
        rows = rows_of(prepared, f"sequences/shown/{phase}")
        assert sum(prepared.shards(f"sequences/shown/{phase}").rows) == len(rows)
        assert {r["user_id"] for r in rows} == {r["user_id"] for r in usable(log) if str(r["date"]) < end}
        assert max(Counter(r["row_id"] for r in rows).values()) == 1
        assert all(str(r["timestamp"] + dt.timedelta(hours=8)) < end for r in rows)


def test_shards_are_shuffled_and_rows_numbered(prepared: Prepared) -> None:
    for name in ("ranking/train", "ranking/test", "recall/train"):
        shards = prepared.shards(name)
        for file, rows in zip(shards.files, shards.rows, strict=True):
            table = pq.read_table(prepared.path / file)
            number = int(Path(file).stem.removeprefix("part-"))
            assert table["row_id"].to_pylist() == [(number << 32) + row for row in range(rows)]
        rows_all = rows_of(prepared, name)
        for column in ("timestamp", "user_id"):
            values = [row[column] for row in rows_all]
            descents = sum(b < a for a, b in itertools.pairwise(values))
            assert 0.3 < descents / len(values) < 0.6  # half of random neighbours descend, fewer with ties
        stamps = [str(row["timestamp"]) for row in rows_all]
        assert (shards.first_event, shards.last_event) == (min(stamps), max(stamps))


def test_the_canonical_log_holds_what_was_kept(prepared: Prepared, log: pa.Table) -> None:
    days = [
        pq.read_table(file, partitioning=None).select(["user_id", "item_id", "timestamp", "history"])
        for file in prepared.path.glob("events/date=*/*.parquet")
    ]
    got = sort_events(pa.concat_tables(days)).to_pylist()
    assert Counter(key(r) for r in got) == Counter(key(r) for r in usable(log))


def test_the_catalogue_counts_training_days_only(prepared: Prepared, log: pa.Table) -> None:
    split = prepared.manifest.config["split"]
    valid, test = (dt.date.fromisoformat(split[name]) for name in ("valid_from", "test_from"))
    rows = [r for r in usable(log) if not r["history"]]
    for period, of in (
        ("train", [r for r in rows if r["date"] < valid]),
        ("valid", [r for r in rows if valid <= r["date"] < test]),
    ):
        shown = Counter(r["item_id"] for r in of)
        wanted = Counter(r["item_id"] for r in of if r["click"] or r["like"])
        held = [r for r in usable(log) if r["history"] and r["date"] < test]
        held = [r for r in held if (r["date"] < valid) == (period == "train")]
        past = Counter(r["item_id"] for r in held if r["click"] or r["like"])  # recall learns from these too
        for item in prepared.items.to_pylist():
            assert item[f"{period}_exposures"] == shown[item["item_id"]]
            assert item[f"{period}_positives"] == wanted[item["item_id"]]
            assert item[f"{period}_weight"] == wanted[item["item_id"]] + past[item["item_id"]]
    assert prepared.items["row"].to_pylist() == list(range(1, len(prepared.items) + 1))


def test_a_second_call_finds_it_done(prepared: Prepared, source: Config) -> None:
    before = {file: file.stat().st_mtime_ns for file in prepared.path.rglob("*")}
    start = time.monotonic()
    assert prepare(config(source), prepared.path).manifest == prepared.manifest
    assert {file: file.stat().st_mtime_ns for file in prepared.path.rglob("*")} == before
    assert time.monotonic() - start < 2


def test_grouping_blocks_and_an_earlier_result_change_nothing(
    prepared: Prepared, source: Config, tmp_path: Path
) -> None:
    """Other groups of users, blocks of a few kB, in a directory that held something else."""
    context = ray.data.DataContext.get_current()
    usual, context.target_max_block_size = context.target_max_block_size, 8_192
    try:
        other = prepare(config(source, buckets=3), tmp_path)
    finally:
        context.target_max_block_size = usual
    same = ("ranking", "recall", "vocabulary", "entities")
    assert digests(tmp_path, *same) == digests(prepared.path, *same)
    assert other.manifest.fingerprint != prepared.manifest.fingerprint
    prepare(config(source), tmp_path)
    assert digests(tmp_path) == digests(prepared.path)


KILLED = """
import os, signal, sys
from pathlib import Path
from recsys_dist import session
from recsys_dist.data import pipeline
from tests.data.small_source import Config, Source

out, source, point = sys.argv[1:]
pipeline.open_source = Source
usual = pipeline._watched

def dying(rows, what, total):
    for number, row in enumerate(usual(rows, what, total)):
        if what == point and number:
            (Path(out) / ".x.partial").write_text("as if cut short")
            os.kill(os.getpid(), signal.SIGKILL)
        yield row

pipeline._watched = dying
session.connect()
cfg = pipeline.PrepareConfig(source=Config(path=source), buckets=4, shard_rows=20)
print(pipeline.prepare(cfg, out).path)
"""


@pytest.mark.parametrize("point", ["reading logs", "counting values", "building examples"])
def test_what_was_killed_continues_to_the_same_result(
    point: str, prepared: Prepared, source: Config, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), source.path, point]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert killed.returncode == -9, killed.stderr
    assert not (tmp_path / "manifest.json").exists()
    events = (tmp_path / "events.json").stat().st_mtime_ns if point != "reading logs" else None
    assert prepare(config(source), tmp_path).manifest == prepared.manifest
    assert digests(tmp_path) == digests(prepared.path)
    if events is not None:
        assert (tmp_path / "events.json").stat().st_mtime_ns == events, "read the logs again"


def test_other_days_reuse_the_events_and_keep_the_rows(
    source: Config, prepared: Prepared, tmp_path: Path
) -> None:
    shutil.copytree(prepared.path, tmp_path, dirs_exist_ok=True)
    made = (tmp_path / "events.json").stat().st_mtime_ns
    limited = small_log.SCHEMA.features[1].model_copy(update={"max_age_days": 2, "max_rows": 9})
    features = (small_log.SCHEMA.features[0], limited, *small_log.SCHEMA.features[2:])
    schema = small_log.SCHEMA.model_copy(update={"features": features})
    days = {"test_from": dt.date(2024, 3, 7), "shard_rows": 1_000}
    with pytest.raises(ConfigError, match="is where the new data go"):
        prepare(config(source, **days, former=str(tmp_path)), tmp_path)
    other = prepare(config(source, **days, features=schema, former=str(prepared.path)), tmp_path)
    assert (tmp_path / "events.json").stat().st_mtime_ns == made
    assert {row["timestamp"].date() for row in rows_of(other, "ranking/valid")} <= {
        dt.date(2024, 3, 5),
        dt.date(2024, 3, 6),
    }
    listed = {str(tmp_path / file) for shards in other.manifest.splits.values() for file in shards.files}
    on_disk = {str(f) for f in tmp_path.rglob("part-*.parquet") if f.parent.parent.name == "users"}
    assert on_disk <= listed, "shards of the former days are left"
    of_item = other.manifest.admissions["item"]
    assert f"'item' has rows for 8 of {of_item.values} values: 0 too rare, {of_item.old} too old" in summary(
        other
    )
    then, now = (p.encoders.vocabularies["item"].values.to_pylist() for p in (prepared, other))
    assert other.items["item_id"].to_pylist() == now and len(now) == 8
    assert [value for value in now if now.index(value) == then.index(value)], "rows are kept"
    assert all(now.index(value) == then.index(value) for value in now if then.index(value) < len(now))
    assert prepared.manifest.admissions["item"].kept == len(then)


def test_a_directory_with_other_files_is_refused(source: Config, tmp_path: Path) -> None:
    for number, name in enumerate(("thesis.txt", "manifest.json")):
        out = tmp_path / str(number)
        out.mkdir()
        (out / name).write_text('{"mine": true}')
        with pytest.raises(DataError, match=f"holds '{name}', which is no prepared data"):
            prepare(config(source), out)
        assert (out / name).read_text() == '{"mine": true}'
    with pytest.raises(ConfigError, match="is a URL"):
        prepare(config(source), "s3://bucket/prepared")


def corrupted(directory: Path, log: pa.Table) -> Config:
    source = write_log(directory, log, parts=5)
    (directory / "log-0.arrow").write_bytes(b"no arrow at all")
    return source


def test_a_corrupt_file_is_named_and_the_rest_is_prepared(
    log: pa.Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = corrupted(tmp_path / "log", log)
    made = prepare(config(source, max_quarantined=0.2), tmp_path / "out")
    assert list(made.manifest.ledger["refused"]) == ["log-0.arrow"]
    assert f"file refused: {made.manifest.ledger['refused']['log-0.arrow']}\n" in summary(made)
    assert made.manifest.ledger["read"] == len(log) - len(log) // 5 - 1
    assert reported(lambda _: prepare(config(source, max_quarantined=0.1), tmp_path / "other"), []) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    for part in (
        "1 of 5 files refused",
        "max_quarantined=0.1",
        "log-0.arrow",
        "other/quarantine",
        "raise the limit",
    ):
        assert part in told


def test_a_log_of_which_nothing_is_usable(tmp_path: Path) -> None:
    source = write_log(tmp_path / "log", small_log.events().slice(0, 20), parts=1)
    (tmp_path / "log/log-0.arrow").write_bytes(b"")
    with pytest.raises(SourceError, match="no usable row"):
        prepare(config(source, max_quarantined=1), tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test_from": dt.date(2024, 4, 1)}, "leaves test empty"),
        ({"valid_from": dt.date(2024, 1, 1), "test_from": dt.date(2024, 3, 8)}, "leaves train empty"),
        ({"valid_from": dt.date(2024, 3, 5), "test_from": dt.date(2024, 3, 6)}, "leaves valid empty"),
        ({"test_from": dt.date(2024, 1, 1)}, "leaves nothing to train on"),
        ({"valid_from": dt.date(2024, 3, 7)}, "set both, or neither"),
    ],
)
def test_days_that_leave_a_part_empty(settings: dict[str, Any], message: str, source: Config) -> None:
    days = {dt.date(2024, 3, number): 10 for number in (1, 2, 3, 4, 6, 7, 8)}
    with pytest.raises(ConfigError, match=message):
        pipeline._split(config(source, **settings), Source(source), days)


def test_a_published_split_holds_unless_other_days_are_asked_for(source: Config) -> None:
    class Published(Source):
        def default_split(self) -> Split:
            return Split(valid_from=day(4), test_from=day(7))

    def day(number: int) -> dt.date:
        return dt.date(2024, 3, number)

    days = {day(number): 1_000 for number in range(1, 9)}
    for settings, valid_from, test_from in (
        ({}, day(4), day(7)),
        ({"valid_from": day(2)}, day(2), day(7)),
        ({"test_from": day(4)}, day(3), day(4)),
    ):
        split = pipeline._split(config(source, **settings), Published(source), days)
        assert (split.valid_from, split.test_from) == (valid_from, test_from)


def test_a_log_of_two_days(log: pa.Table, tmp_path: Path) -> None:
    early = log.filter(pc.less(log["date"], pa.scalar(small_log.FIRST_DAY + dt.timedelta(days=3))))
    with pytest.raises(DataError, match="at least 3: training, validation and test days"):
        prepare(config(write_log(tmp_path / "log", early)), tmp_path / "out")


def test_a_feature_over_a_column_that_is_not_there(source: Config, tmp_path: Path) -> None:
    def schema(column: str) -> Any:
        features = (*small_log.SCHEMA.features, Categorical(name="mood", column=column))
        return small_log.SCHEMA.model_copy(update={"features": features})

    with pytest.raises(DataError, match=r"attribute 'mood'.*it has: item_id, genre, length"):
        prepare(config(source, features=schema("items.mood")), tmp_path / "a")
    with pytest.raises(DataError, match=r"required column 'divice' is missing; did you mean 'device'"):
        prepare(config(source, features=schema("divice")), tmp_path / "b")


def test_an_error_in_a_task_is_the_projects_own(
    source: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a full disk: raised in a Ray task, seen here as the DataError that it was there."""
    (tmp_path / "quarantine").write_text("a file where tasks want a directory")
    monkeypatch.setattr(pipeline, "_clear", lambda *_, **__: None)
    with pytest.raises(DataError, match=r"quarantine/part-00000.parquet' cannot be written") as error:
        prepare(config(source), tmp_path)
    assert error.value.__suppress_context__
