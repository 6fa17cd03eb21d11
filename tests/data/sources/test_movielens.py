"""MovieLens, both of GroupLens' layouts; the real ml-1m has the rows it is known for."""

from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from recsys_dist.data.logs import LogSpec, validate
from recsys_dist.data.sources.movielens import Config, Source
from recsys_dist.errors import SourceError

REAL = Path(__file__).parents[4] / "shared" / "data" / "ml-1m"
DAT = {
    "ratings.dat": "1::1193::5::978300760\n1::661::3::978302109\n2::661::many::978302110\n2::661\n",
    "users.dat": "1::F::1::10::48067\n2::M::56::16::70072-1234\n",
    "movies.dat": "1193::Alien: A Title (1975)::Drama\n661::Amélie::Comedy|Drama\n",
}
CSV = {
    "ratings.csv": "userId,movieId,rating,timestamp\n1,296,4.0,1147880044\n1,306,3.5,1147868817\n",
    "movies.csv": 'movieId,title,genres\n296,"Pulp, Fiction (1994) ",Crime|Drama\n306,Red,Drama\n',
}


def source(path: Path, files: dict[str, str], **settings: object) -> Source:
    for name, text in files.items():
        (path / name).write_text(text, encoding="latin-1" if name.endswith(".dat") else "utf-8")
    return Source(Config.parse({"path": str(path), **settings}))


def rows(source: Source) -> pa.Table:
    chunks = (chunk for part in source.parts() for chunk in source.read(part))
    return pa.concat_tables(chunks, promote_options="default")


def test_dat_layout(tmp_path: Path) -> None:
    ml = source(tmp_path, DAT)
    checked = validate(rows(ml), LogSpec.from_schema(ml.schema()), "ratings.dat", ml.timestamp_unit)
    assert checked.kept["like"].to_pylist() == [1, 0]
    assert checked.kept["item_id"].to_pylist() == ["1193", "661"]
    assert checked.quarantined["row"].to_pylist() == [2, 3]
    assert checked.quarantined["reason"].to_pylist()[1] == "wrong number of fields"
    users, films = ml.users(), ml.items()
    assert users is not None and films is not None
    assert users.to_pylist()[1] == {
        "user_id": "2",
        "gender": "M",
        "age": "56",
        "occupation": "16",
        "zip": "70072-1234",
        "region": "70",
    }
    assert films["title"].to_pylist() == ["Alien: A Title (1975)", "Amélie"]
    assert films["year"].to_pylist() == [1975.0, None]
    assert films["genre"].to_pylist() == ["Drama", "Comedy"]


def test_csv_layout_has_no_users(tmp_path: Path) -> None:
    ml = source(tmp_path, CSV, like_from=3.5)
    assert rows(ml)["like"].to_pylist() == [1, 1]
    assert ml.users() is None
    assert not any("users." in getattr(f, "column", "") for f in ml.schema().features)
    films = ml.items()
    assert films is not None and films["year"].to_pylist() == [1994.0, None]


def test_films_without_a_title_or_a_genre(tmp_path: Path) -> None:
    films = source(tmp_path, {**CSV, "movies.csv": "movieId,title,genres\n1,,Drama\n2,A (1990),\n"}).items()
    assert films is not None and films["year"].to_pylist() == [None, 1990.0]
    assert films["genre"].to_pylist() == ["Drama", None]


def test_a_broken_side_file_is_named(tmp_path: Path) -> None:
    ml = source(tmp_path, {**DAT, "users.dat": "1::F\n"})
    with pytest.raises(SourceError, match=r"users.dat: line 1 has 2 fields, expected 5: user_id::gender"):
        ml.users()


@pytest.mark.skipif(not REAL.is_dir(), reason=f"ml-1m is not at {REAL}")
def test_the_real_ml_1m() -> None:
    ml = Source(Config(path=str(REAL)))
    spec = LogSpec.from_schema(ml.schema())
    parts = [validate(chunk, spec, "r", "s") for chunk in ml.read(ml.parts()[0])]
    kept = pa.concat_tables(part.kept for part in parts)
    assert len(kept) == 1_000_209
    assert pc.mean(kept["like"]).as_py() == pytest.approx(575_281 / 1_000_209)
    users, films = ml.users(), ml.items()
    assert users is not None and films is not None
    assert (len(users), len(films)) == (6_040, 3_883)
    assert films["year"].null_count == 0
