"""KuaiRand: history lists become rows by the k-th-exposure rule; the real cut adds up."""

import datetime as dt
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from recsys_dist.data.logs import Ledger, LogSpec, duplicates, validate
from recsys_dist.data.sources.kuairand import Config, Source, history_rows
from recsys_dist.errors import SourceError

REAL = Path(__file__).parents[4] / "shared" / "data" / "kuairand-pure"
HEADER = "user_id,video_id,date,time_ms,is_click,is_like,long_view,play_time_ms,duration_ms,tab"
LISTS = pa.list_(pa.int64())


def users(rows: list[tuple[int, int, list[int], list[int], list[int]]]) -> pa.Table:
    names = ["user_id", "last_time_ms", "exposed_video_ids", "liked_video_ids", "long_view_video_ids"]
    types = [pa.int64(), pa.int64(), LISTS, LISTS, LISTS]
    columns = list(zip(*rows, strict=True)) or [()] * 5
    arrays = [pa.array(values, kind) for values, kind in zip(columns, types, strict=True)]
    return pa.table([*arrays, pa.array(range(len(rows)))], names=[*names, "row"])


def test_history_rows_by_hand() -> None:
    table = history_rows(
        users([(5, 1000, [7, 8, 7, 7], [8], [7, 7, 9]), (6, 50, [], [], [3]), (4, 2000, [8], [], [8])])
    )
    assert table["user_id"].to_pylist() == [5, 5, 5, 5, 4]
    assert table["item_id"].to_pylist() == [7, 8, 7, 7, 8]
    assert table["timestamp"].to_pylist() == [997, 998, 999, 1000, 2000]
    assert table["long_view"].to_pylist() == [1, 0, 1, 0, 1]  # 7 is listed twice: its first two exposures
    assert table["like"].to_pylist() == [0, 1, 0, 0, 0]
    assert table["row"].to_pylist() == [0, 0, 0, 0, 2]
    assert table["click"].null_count == 5 and pc.all(table["history"]).as_py()


def test_history_of_nobody() -> None:
    assert history_rows(users([])).num_rows == 0
    assert history_rows(users([(5, 1000, [], [], [])])).num_rows == 0


def write_log(path: Path, name: str, columns: str = "") -> None:
    header = (
        columns or "user_id,video_id,date,time_ms,is_click,is_like,long_view,play_time_ms,duration_ms,tab"
    )
    (path / name).write_text(header + "\n1,10,20220425,1650812741436,1,0,1,61802,49866,1\n")


def test_the_history_is_found_wherever_the_log_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pure").mkdir()
    write_log(tmp_path / "pure", "log_standard_4_22_to_5_08_pure.csv")
    for day in ("4_20", "4_24"):
        pq.write_table(users([(5, 1000, [7], [], [])]), tmp_path / f"pure/history_until_{day}.parquet")
    for path in (str(tmp_path / "pure"), "~/pure", f"file://{tmp_path}/pure/"):
        names = [part.name for part in Source(Config(path=path)).parts()]
        assert names == ["history_until_4_24.parquet", "log_standard_4_22_to_5_08_pure.csv"], path


def test_files_of_upstream_in_time_order_and_random_ones_on_request(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    names = [f"log_standard_4_{days}_pure.csv" for days in ("08_to_4_21", "22_to_5_08")]
    for name in [*names, "log_random_4_22_to_5_08_pure.csv"]:
        write_log(tmp_path / "data", name)
    assert [part.name for part in Source(Config(path=str(tmp_path))).parts()] == names
    assert len(Source(Config(path=str(tmp_path), random=True)).parts()) == 3


def test_a_log_without_a_column_is_refused_by_name(tmp_path: Path) -> None:
    write_log(tmp_path, "log_standard_4_22_to_5_08_pure.csv", HEADER.replace("time_ms,is", "timems,is"))
    source = Source(Config(path=str(tmp_path)))
    with pytest.raises(SourceError, match=r"log_standard.*'time_ms' is missing; did you mean 'timems'"):
        list(source.read(source.parts()[0]))


@pytest.mark.skipif(not REAL.is_dir(), reason=f"the KuaiRand-Pure cut is not at {REAL}")
def test_the_real_cut() -> None:
    source = Source(Config(path=str(REAL)))
    spec, ledger, kept = LogSpec.from_schema(source.schema()), Ledger(), []
    for part in source.parts():
        for chunk in source.read(part):
            checked = validate(chunk, spec, part.name, source.timestamp_unit)
            ledger = ledger.add(part.name, checked)
            kept.append(checked.kept)
    ledger.check()
    table = pa.concat_tables(kept)
    events = table.filter(pc.invert(table["history"]))
    history = table.filter(table["history"])
    assert len(events) == ledger.parts["log_standard_4_25_to_5_08_pure.csv"].kept == 228_329
    assert ledger.quarantined.total() == 0
    assert duplicates(table).sum() == duplicates(events).sum() == 5_885
    test = events.filter(pc.greater_equal(events["date"], source.default_split()))
    assert len(test) == 133_545
    assert pc.mean(events["click"]).as_py() == pytest.approx(0.4419, abs=1e-4)
    lists = pq.read_table(REAL / "history_until_4_24.parquet", columns=["exposed_video_ids"])
    assert len(history) == pc.sum(pc.list_value_length(lists["exposed_video_ids"])).as_py()
    assert pc.max(history["date"]).as_py() == dt.date(2022, 4, 24)
    described = source.users(), source.items()
    assert [len(t) for t in described if t is not None] == [27_285, 7_583]
    for feature in source.schema().features:
        _, dot, attribute = getattr(feature, "column", "").partition(".")
        assert not dot or any(t is not None and attribute in t.column_names for t in described), attribute
