"""What every source promises, whichever it is: found by its name, tried on a small log of its own."""

import pickle
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recsys_dist.config import digest
from recsys_dist.data.logs import LogSpec, validate
from recsys_dist.data.sources.protocol import (
    CHUNK_ROWS,
    Part,
    Source,
    open_source,
    source_config,
    source_for,
    source_module,
    source_names,
)
from recsys_dist.data.split import Split
from recsys_dist.errors import ConfigError, SourceError
from recsys_dist.feature_kinds import Statistic, side
from recsys_dist.schema import Schema
from tests.data.sources import published

KUAIRAND_LOG = """user_id,video_id,date,time_ms,is_click,is_like,long_view,play_time_ms,duration_ms,tab
1,10,20220425,1650812741436,1,0,1,61802,49866,1
2,11,20220425,1650812934945,0,0,0,1184,11933,0
"""
KUAIRAND_USERS = "user_id,follow_user_num,fans_user_num,friend_user_num,register_days\n1,5,6,7,8\n2,,0,0,1\n"
KUAIRAND_ITEMS = "video_id,author_id,video_duration,tag\n10,3,1000,4\n11,3,,5\n"


def kuairand(path: Path) -> dict[str, object]:
    (path / "log_standard_4_22_to_5_08_pure.csv").write_text(KUAIRAND_LOG)
    (path / "user_features_pure.csv").write_text(KUAIRAND_USERS)
    (path / "video_features_basic_pure.csv").write_text(KUAIRAND_ITEMS)
    return {"path": str(path)}


def movielens(path: Path) -> dict[str, object]:
    (path / "ratings.dat").write_text("1::1193::5::978300760\n1::661::3::978302109\n2::1193::4::978300000\n")
    (path / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n")
    films = "1193::One Flew: Cuckoo's Nest (1975)::Drama\n661::Amélie (1996)::Comedy|Drama\n"
    (path / "movies.dat").write_text(films, encoding="latin-1")
    return {"path": str(path)}


def parquet(path: Path) -> dict[str, object]:
    log = {
        "uid": [1, 2, 1],
        "sku": ["a", "b", "b"],
        "ts": [1714572000, 1714572001, 1714572002],
        "hit": [1, 0, 1],
    }
    (path / "events").mkdir()
    pq.write_table(pa.table(log), path / "events" / "log.parquet")
    (path / "users.csv").write_text("uid,city\n1,Kyoto\n2,Oslo\n3,Oslo\n")
    return {
        "events": str(path / "events"),
        "users": {"path": str(path / "users.csv"), "id": "uid"},
        "columns": {"user_id": "uid", "item_id": "sku", "timestamp": "ts", "labels": {"click": "hit"}},
    }


def simulate(_: Path) -> dict[str, object]:
    return {"users": 50, "items": 20, "events": 1_000}


SMALL: dict[str, Callable[[Path], dict[str, object]]] = {
    "frappe": published.frappe,
    "gowalla": published.gowalla,
    "kuairand": kuairand,
    "ml1m_ctr": published.ml1m_ctr,
    "ml1m_leave_one_out": published.ml1m_leave_one_out,
    "movielens": movielens,
    "parquet": parquet,
    "simulate": simulate,
}


@pytest.fixture(params=source_names())
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    return open_source(source_config({"kind": request.param, **SMALL[request.param](tmp_path)}))


def rows_of(source: Source) -> list[pa.Table]:
    return [chunk for part in source.parts() for chunk in source.read(part)]


def test_every_source_has_a_small_log_here() -> None:
    assert sorted(SMALL) == source_names()


def test_schema_is_valid_and_names_no_unknown_attribute(source: Source) -> None:
    schema = source.schema()
    assert Schema.parse(schema.model_dump()) == schema
    assert schema.item_id.column == "item_id"
    assert digest(schema.model_dump(mode="json")) == source.schema().digest()


def test_parts_are_small_named_and_stable(source: Source) -> None:
    parts = source.parts()
    assert parts and parts == source.parts()
    assert len({part.name for part in parts}) == len(parts)
    assert all(isinstance(part, Part) and pickle.loads(pickle.dumps(part)) == part for part in parts)
    assert len(pickle.dumps(source)) < 10_000


def test_rows_are_canonical_and_valid(source: Source) -> None:
    spec = LogSpec.from_schema(source.schema())
    for part in source.parts():
        rows = [row for chunk in source.read(part) for row in chunk["row"].to_pylist()]
        assert rows == sorted(rows)
        for chunk in source.read(part):
            assert set(spec.required) <= set(chunk.column_names)
            assert chunk["row"].type == pa.int64() and 0 < len(chunk) <= 2 * CHUNK_ROWS
            checked = validate(chunk, spec, part.name, source.timestamp_unit)
            assert checked.quarantined.num_rows == 0, checked.quarantined.to_pylist()[:3]


def test_reading_twice_gives_the_same(source: Source) -> None:
    again = pickle.loads(pickle.dumps(source))
    for one, other in zip(rows_of(source), rows_of(again), strict=True):
        assert one.equals(other)


def test_users_and_items_have_unique_ids_and_the_attributes_of_the_schema(source: Source) -> None:
    for table, key, of in ((source.users(), "user_id", "user"), (source.items(), "item_id", "item")):
        if table is None:
            continue
        ids = table[key]
        assert ids.type == pa.string() and ids.null_count == 0
        assert len(ids.unique()) == len(ids)
        for feature in source.schema().features:
            column = feature.key if isinstance(feature, Statistic) else getattr(feature, "column", "")
            if "." in column and side(column) == of and source_is_complete(source):
                assert column.split(".")[1] in table.column_names, column


def source_is_complete(source: Source) -> bool:
    """The small KuaiRand above leaves out most of the attribute columns."""
    return "kuairand" not in type(source).__module__


def test_the_published_split_lies_within_reason(source: Source) -> None:
    split = source.default_split()
    test_from = split.test_from if isinstance(split, Split) else split
    assert test_from is None or 2000 < test_from.year < 2030


@pytest.mark.parametrize("name", [name for name in source_names() if name != "simulate"])
def test_a_wrong_path_is_named(name: str, tmp_path: Path) -> None:
    config = SMALL[name](tmp_path)
    wrong = str(tmp_path / "nowhere")
    config |= {key: wrong for key in ("path", "events") if key in config}
    with pytest.raises(SourceError, match="nowhere"):
        open_source(source_config({"kind": name, **config})).parts()


@pytest.mark.parametrize("name", ["frappe", "gowalla", "kuairand", "movielens"])
def test_a_directory_is_recognised(name: str, tmp_path: Path) -> None:
    SMALL[name](tmp_path)
    assert source_for(str(tmp_path)).kind == name


@pytest.mark.parametrize(
    ("name", "folder"), [("ml1m_ctr", "ctr_by_day"), ("ml1m_leave_one_out", "leave_one_out")]
)
def test_a_split_of_movielens_is_recognised_by_its_own_directory(
    name: str, folder: str, tmp_path: Path
) -> None:
    config = SMALL[name](tmp_path)
    (tmp_path / "ratings.dat").write_text("1::1193::5::978300760\n")
    assert source_for(str(tmp_path)).kind == "movielens"
    assert source_for(str(tmp_path / "splits" / folder)) == source_config({"kind": name, **config})


def test_what_no_source_knows() -> None:
    with pytest.raises(SourceError, match=r"nowhere: does not exist; expected"):
        source_for("nowhere")
    with pytest.raises(SourceError, match=r"no log that a source knows"):
        source_for(str(Path(__file__).parent))
    with pytest.raises(ConfigError, match="did you mean 'parquet'"):
        source_module("parket")
    with pytest.raises(ConfigError, match="needs `kind`"):
        source_config({"path": "x"})
