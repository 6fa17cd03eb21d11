"""Anyone's files: mapped columns, partitions, remote paths, and a clear outcome for every broken file."""

import datetime as dt
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_dist.data.encoders import _raw
from recsys_dist.data.entities import Entities
from recsys_dist.data.logs import Ledger, LogSpec, validate
from recsys_dist.data.sources import parquet
from recsys_dist.data.sources.parquet import Config, Source, recognise
from recsys_dist.data.sources.protocol import source_for
from recsys_dist.errors import ConfigError, SourceError

MAPPING = """
kind: parquet
events: events
users: {path: users.csv, id: uid}
items: {path: items.parquet, id: sku}
columns:
  user_id: uid
  item_id: sku
  timestamp: ts
  date: day
  labels:
    click: hit
    like: {column: stars, at_least: 4}
    watch_s: {column: seen, kind: value}
  context: {tab: page, day: day}
timestamp_unit: ms
"""
COLUMNS = {"user_id": "uid", "item_id": "sku", "timestamp": "ts", "labels": {"click": "hit"}}


def log(day: int, rows: int = 4) -> pa.Table:
    start = int(dt.datetime(2024, 5, day, tzinfo=dt.UTC).timestamp() * 1000)
    return pa.table(
        {
            "uid": pa.array([n % 3 for n in range(rows)], pa.int32()),
            "sku": [float(n) for n in range(rows)],
            "ts": [start + n for n in range(rows)],
            "hit": [n % 2 == 0 for n in range(rows)],
            "stars": [n % 6 for n in range(rows)],
            "seen": [n / 2 for n in range(rows)],
            "page": pa.array([f"p{n % 2}" for n in range(rows)]).dictionary_encode(),
        }
    )


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    for day in (1, 2):
        folder = tmp_path / "events" / f"day=2024-05-0{day}"
        folder.mkdir(parents=True)
        pq.write_table(log(day), folder / "part-0.parquet", row_group_size=3)
    (tmp_path / "users.csv").write_text("uid,city,score,note\n0,Oslo,1.5,a\n1,Oslo,,b\n2,Kyoto,-3,c\n")
    items = {"sku": [0, 1, 2, 3], "brand": ["a", "b", "a", None], "price": [1.0, 2.0, 3.0, None]}
    pq.write_table(pa.table({**items, "tags": [["x"], [], None, ["y"]]}), tmp_path / "items.parquet")
    (tmp_path / "log.yaml").write_text(MAPPING)
    return tmp_path


def opened(path: Path) -> Source:
    cfg = recognise(str(path))
    assert cfg is not None
    return Source(cfg)


def read(source: Source) -> tuple[pa.Table, Ledger]:
    spec, ledger, kept = LogSpec.from_schema(source.schema()), Ledger(), []
    for part in source.parts():
        try:
            for chunk in source.read(part):
                checked = validate(chunk, spec, part.name, source.timestamp_unit)
                ledger = ledger.add(part.name, checked)
                kept.append(checked.kept)
        except SourceError as error:
            ledger = ledger.refuse(part.name, str(error))
    ledger.check()
    return pa.concat_tables(kept), ledger


def test_mapped_columns_and_partitions(mine: Path) -> None:
    table, ledger = read(opened(mine))
    assert (ledger.read, ledger.kept) == (8, 8)
    assert table.slice(4, 1).to_pylist() == [
        {
            "user_id": "0",
            "item_id": "0",
            "timestamp": dt.datetime(2024, 5, 2, tzinfo=dt.UTC),
            "date": dt.date(2024, 5, 2),
            "history": False,
            "click": 1,
            "like": 0,
            "watch_s": 0.0,
            "tab": "p0",
            "day": "2024-05-02",
        }
    ]
    assert table["like"].to_pylist() == [0] * 8
    assert table["item_id"].to_pylist() == ["0", "1", "2", "3"] * 2  # floats in the file


def test_the_derived_schema_reads_types(mine: Path) -> None:
    source = opened(mine)
    kinds = {feature.name: feature.kind for feature in source.schema().features}
    assert kinds["user_city"] == kinds["item_brand"] == kinds["context_tab"] == "categorical"
    assert kinds["user_score"] == kinds["item_price"] == "numeric"
    assert not {"user_note", "item_tags", "user_uid", "item_sku"} & set(kinds)
    assert source.schema().ranking_label == "click"
    users, items = source.users(), source.items()
    assert users is not None and users["score"].to_pylist() == [1.5, None, -3.0]
    assert users["user_id"].to_pylist() == ["0", "1", "2"]
    assert items is not None and items["item_id"].to_pylist() == ["0", "1", "2", "3"]


def test_features_of_ones_own(mine: Path) -> None:
    features = """
features:
  - {kind: categorical, name: item, column: item_id}
  - {kind: numeric, name: stars_before, column: stars}
  - {kind: bucketed, name: score, column: users.score}
recall_positive: [click, like]
"""
    (mine / "log.yaml").write_text(MAPPING + features)
    source = opened(mine / "log.yaml")
    assert [f.name for f in source.schema().features] == ["item", "stars_before", "score"]
    table, _ = read(source)
    assert table["stars"].to_pylist() == [0.0, 1.0, 2.0, 3.0] * 2  # a context column of the same name


def test_broken_files_cost_themselves_only(mine: Path) -> None:
    folder = mine / "events" / "day=2024-05-02"
    whole = (folder / "part-0.parquet").read_bytes()
    (folder / "empty.parquet").write_bytes(b"")
    (folder / "truncated.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "text.parquet").write_text("not parquet at all")
    half = log(2).select(["uid", "sku", "ts"]).rename_columns(["uid", "sku", "tss"])
    pq.write_table(half, folder / "half.parquet")
    pq.write_table(log(2, 0), folder / "no_rows.parquet")
    (folder / "_SUCCESS.parquet").write_text("")
    (folder / "empty.csv").write_text("")
    (folder / "bytes.csv").write_bytes(b"uid,sku,ts,hit,stars,seen,page\n1,\xff,3,4,5,6,7\n")
    table, ledger = read(opened(mine))
    assert len(table) == 8
    reasons = {Path(name).name: text for name, text in ledger.refused.items()}
    assert set(reasons) == {
        "empty.parquet",
        "truncated.parquet",
        "text.parquet",
        "half.parquet",
        "empty.csv",
        "bytes.csv",
    }
    assert all(str(folder) in text for text in reasons.values())
    assert "0 bytes" in reasons["empty.parquet"]
    assert "'ts' is missing; did you mean 'tss'" in reasons["half.parquet"]


def test_csv_values_and_lines_are_quarantined_one_by_one(mine: Path) -> None:
    lines = [
        "uid,sku,ts,hit,stars,seen,page",
        "1,a,1714521600000,1,5,2.5,x",
        "1,a,1714521600001,1",
        '1,"b,\n2",1714521600002,0,4,1,x',
        "1,c,1714521600003,1,five,1,x",
        "1,d,1714521600004,1,5,long,x",
        "1,e,1714521600005,1,5,1,x,y",
        "1,f,1714521600006,1,3,1,",
    ]
    (mine / "events" / "day=2024-05-01" / "more.csv").write_text("\n".join(lines))
    source = opened(mine)
    (part,) = [p for p in source.parts() if p.file.endswith(".csv")]
    spec = LogSpec.from_schema(source.schema())
    done = [validate(chunk, spec, "more.csv", "ms") for chunk in source.read(part)]
    kept = pa.concat_tables(d.kept for d in done)
    assert kept["item_id"].to_pylist() == ["a", "b,\n2", "f"]
    assert kept["like"].to_pylist() == [1, 1, 0] and kept["tab"].to_pylist() == ["x", "x", None]
    bad = pa.concat_tables(d.quarantined for d in done).sort_by("row")
    assert bad["row"].to_pylist() == [1, 3, 4, 5]
    assert bad["reason"].to_pylist() == [
        "wrong number of fields",
        "like is not 0 or 1",
        "watch_s is not a number",
        "wrong number of fields",
    ]


def test_paths_that_match_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "notes.txt").write_text("")
    cases = {
        f"{tmp_path}/log": rf"{tmp_path}/log: does not exist; {tmp_path} holds logs",
        f"{tmp_path}/logs": "no file matches; expected names that end in .parquet",
        f"{tmp_path}/logs/*.parquet": "no file matches",
        "memory://nowhere": "memory://nowhere: does not exist",
        "nosuchscheme://bucket": "nosuchscheme",
    }
    for path, message in cases.items():
        with pytest.raises(SourceError, match=message.replace("*", r"\*")):
            Source(Config.parse({"events": path, "columns": COLUMNS})).parts()


def test_any_file_system(mine: Path) -> None:
    memory = fsspec.filesystem("memory")
    data = (mine / "events" / "day=2024-05-01" / "part-0.parquet").read_bytes()
    memory.pipe({f"/bucket/logs/dt={n}/x.parquet": data for n in (1, 2)} | {"/bucket/logs/y.csv": b"uid\n"})
    for pattern, files in (("memory://bucket/logs/**/*.parquet", 2), ("memory://bucket/logs/dt=2/*", 1)):
        cfg = Config.parse({"events": pattern, "columns": COLUMNS, "timestamp_unit": "ms"})
        table, ledger = read(Source(cfg))
        assert (len(table), len(ledger.parts)) == (4 * files, files)
    local = Config.parse({"events": [f"file://{mine}/events"], "columns": COLUMNS, "timestamp_unit": "ms"})
    assert len(read(Source(local))[0]) == 8


def test_large_files_become_several_parts(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read(opened(mine))[0]
    monkeypatch.setattr(parquet, "PART_BYTES", 1_000)
    source = opened(mine)
    assert len(source.parts()) == 4
    assert source.parts()[1].name.endswith("part-0.parquet [row groups 1-1]")
    assert [c["row"].to_pylist() for p in source.parts()[:2] for c in source.read(p)] == [[0, 1, 2], [3]]
    assert read(source)[0].equals(whole)


def test_tables_of_users_and_items_must_be_sound(mine: Path) -> None:
    for text, message in (
        ("uid,city\n0,Oslo\n0,Rome\n", r"users.csv: uid 0 is there more than once"),
        ("uid,city\n0,Oslo\n,Rome\n", r"users.csv: 1 rows have no uid"),
        ("id,city\n0,Oslo\n", r"users.csv: column 'uid' is missing; did you mean 'id'"),
        ("uid,city\n0,Oslo,7\n", r"users.csv: row 0 does not have the 2 fields"),
        ("uid,user_id\n0,7\n", r"users.csv: has a column 'user_id' beside its id 'uid'"),
        ("uid,sc\u00f6re\n0,1.5\n", r"users.csv: cannot be read, .*utf-8"),
    ):
        (mine / "users.csv").write_text(text, encoding="latin-1")
        with pytest.raises(SourceError, match=message):
            opened(mine).users()


def test_a_table_in_several_files_is_refused_and_not_read_in_part(mine: Path) -> None:
    (mine / "log.yaml").write_text(MAPPING.replace("users.csv", "u*.csv"))
    (mine / "users-2.csv").write_text("uid,city,score,note\n3,Rome,2.5,d\n")
    with pytest.raises(SourceError, match=r"u\*.csv: 2 files, where one table is read"):
        opened(mine).users()


def test_attributes_with_a_dot_in_their_name_are_features(mine: Path) -> None:
    table = pq.read_table(mine / "items.parquet")
    pq.write_table(table.rename_columns(["sku", "meta.brand", "price", "tags"]), mine / "items.parquet")
    source = opened(mine)
    [brand] = [feature for feature in source.schema().features if feature.name == "item_meta_brand"]
    described = Entities.of(source.items(), "item_id", pa.array(["0", "1", "2", "3"]))
    assert _raw(described, brand.column).to_pylist() == ["a", "b", "a", None]


def test_features_are_derived_from_the_first_file_that_can_be_read(mine: Path) -> None:
    whole = opened(mine).schema()
    (mine / "events/day=2024-05-01/part-0.parquet").write_bytes(b"")
    assert opened(mine).schema() == whole
    kept, ledger = read(opened(mine))
    assert len(kept) == 4 and len(ledger.refused) == 1


def test_text_in_a_number_of_a_user_is_an_error(mine: Path) -> None:
    item = "{kind: categorical, name: i, column: item_id}"
    city = "{kind: numeric, name: s, column: users.city}"
    (mine / "log.yaml").write_text(f"{MAPPING}features: [{item}, {city}]")
    with pytest.raises(SourceError, match=r"users.csv: city must be a finite number, row 0 has Oslo"):
        opened(mine).users()
    (mine / "users.csv").write_text("uid,city\n0,1.5\n1,inf\n")
    with pytest.raises(SourceError, match=r"users.csv: city must be a finite number, row 1 has inf"):
        opened(mine).users()


def test_mistakes_in_the_mapping_are_named(mine: Path) -> None:
    (mine / "log.yaml").write_text(MAPPING.replace("timestamp_unit", "timestamp_unt"))
    with pytest.raises(ConfigError, match=r"timestamp_unt.*did you mean 'timestamp_unit'"):
        source_for(str(mine))
    with pytest.raises(ConfigError, match="no binary label"):
        labels = {"seen": {"column": "seen", "kind": "value"}}
        Source(Config.parse({"events": "x", "columns": {"labels": labels}})).schema()


def test_derived_names_never_collide(mine: Path) -> None:
    (mine / "users.csv").write_text("uid,id,count\n0,5,1.5\n1,5,2.5\n2,6,3.5\n")
    names = [feature.name for feature in opened(mine).schema().features]
    assert {"user", "user_id_2", "user_count", "user_count_2"} <= set(names)


def test_a_home_that_there_is_not_is_named() -> None:
    with pytest.raises(SourceError, match=r"~nobody-of-that-name/log\.yaml: there is no user"):
        recognise("~nobody-of-that-name/log.yaml")


def test_a_column_with_a_name_of_ours_is_refused(mine: Path) -> None:
    (mine / "users.csv").write_text("uid,row\n1,7\n")
    cfg = recognise(str(mine / "log.yaml"))
    assert cfg is not None
    with pytest.raises(SourceError, match=r"users\.csv: a column .* cannot be called 'row'; rename it"):
        Source(cfg).users()
