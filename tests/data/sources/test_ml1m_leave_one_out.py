"""Leave one out: training is train_input, the last film is test's, and all before it is known by then."""

from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from recsys_dist.data.examples import sort_events
from recsys_dist.data.sources.ml1m_leave_one_out import Config, Source
from recsys_dist.data.split import Split
from recsys_dist.errors import SourceError
from tests.data.sources.published import REAL, SEQUENCES, Made, events_of, make, ml1m_leave_one_out

FOLDER = REAL / "ml-1m"
TRAIN = {"30": ["51", "52"], "10": ["52", "51"], "20": ["55", "56", "54"]}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ml-1m")
    ml1m_leave_one_out(path)
    return path


@pytest.fixture(scope="module")
def made(path: Path) -> Made:
    return make(Source(Config(path=str(path))))


def test_training_is_train_input_each_film_after_those_before_it(made: Made) -> None:
    rows = made.examples["train"]
    want = {(user, film): films[:at] for user, films in TRAIN.items() for at, film in enumerate(films)}
    assert {(r["user_id"], r["item_id"]): r["films"] for r in rows} == want
    assert len(rows) == len(want) and all(r["weight"] == r["_ranking"] == r["rated"] == 1 for r in rows)


def test_validation_and_test_are_the_outputs_after_all_that_came_before(made: Made) -> None:
    sequences = {user: list(map(str, films)) for user, films in SEQUENCES.items()}
    assert [(r["user_id"], r["item_id"], r["films"]) for r in made.examples["valid"]] == [
        ("30", "54", ["51", "52", "53"])
    ]
    valid = made.states["valid"]["30"]
    # film 53, too, is history and never trained on: no training day knows another rating of it
    assert (valid["films"], valid["truth"]) == (["51", "52", "53"], ["54"])
    assert len(made.states["valid"]) == 1 and sorted(valid["seen"]) == ["51", "52", "53"]
    for user, state in made.states["test"].items():
        assert state["films"] == sequences[user][:-1]
        assert sorted(state["seen"]) == sorted(sequences[user][:-1])
        assert state["truth"] == sequences[user][-1:]
    assert {(r["user_id"], r["item_id"]) for r in made.examples["test"]} == {
        (user, films[-1]) for user, films in sequences.items()
    }
    assert len(made.states["test"]) == 3


def test_one_example_of_each_user_for_models_that_learn_every_step(path: Path) -> None:
    made = make(Source(Config(path=str(path), train_on="last", max_length=2)))
    rows = {r["user_id"]: (r["films"], r["item_id"]) for r in made.examples["train"]}
    assert rows == {user: (films[-3:-1], films[-1]) for user, films in TRAIN.items()}
    assert made.states["test"]["20"]["films"] == ["54", "51"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("val_input.txt", "1 3 3\n", r"val_input.txt: line 1, less its last film, is no line of train_input"),
        ("val_output.txt", "4\n5\n", r"val_output.txt: 2 lines, expected 1"),
        ("test_output.txt", "5\n3\n", r"test_output.txt: 2 lines, expected 3"),
        ("train_input.txt", "1 2\n2 1\n5 6\n", r"ratings.dat: user 20 has 2 ratings that no file"),
        ("sas_to_original_users.txt", "1 30 40\n", r"users.txt: every line must be two numbers"),
    ],
)
def test_files_that_do_not_fit_together(file: str, text: str, message: str, tmp_path: Path) -> None:
    ml1m_leave_one_out(tmp_path)
    (tmp_path / "splits" / "leave_one_out" / file).write_text(text)
    source = Source(Config(path=str(tmp_path)))
    with pytest.raises(SourceError, match=message):
        [list(source.read(part)) for part in source.parts()]


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"ml-1m is not at {FOLDER}")
def test_the_real_split() -> None:
    source = Source(Config(path=str(FOLDER)))
    split = source.default_split()
    assert isinstance(split, Split)
    events = sort_events(events_of(source))
    which, history = split.assign(events["date"]), events["history"].to_numpy()
    assert [int(((which == at) & ~history).sum()) for at in range(3)] == [987_019, 512, 6_040]
    assert history.sum() == pc.count_distinct(events["user_id"]).as_py() == 6_040
    assert pc.count_distinct(events["item_id"].filter(which == 0)).as_py() == 3_416

    validated = set(events["user_id"].filter(pa.array((which == 1) & ~history)).to_pylist())
    tenth = validated | {str(user) for user in range(0, 6_041, 10)}
    chosen = events.append_column("split", [which]).filter(pc.is_in(events["user_id"], pa.array(tenth)))
    grouped = chosen.group_by("user_id", use_threads=False)
    sequences = grouped.aggregate([("item_id", "list"), ("split", "list")]).to_pylist()
    folder = FOLDER / "splits" / "leave_one_out"
    lines = (line.split() for line in (folder / "sas_to_original_items.txt").read_text().splitlines())
    number_of = {film: number for number, film in lines}
    known = [
        [number_of[film] for film, at in zip(row["item_id_list"], row["split_list"], strict=True) if at == 0]
        for row in sequences
        if row["user_id"] in validated
    ]
    assert sorted(known) == sorted(map(str.split, (folder / "val_input.txt").read_text().splitlines()))

    ratings = (line.split("::") for line in (FOLDER / "ratings.dat").read_text().splitlines())
    rated_at = {(user, film): int(at) for user, film, _, at in ratings if user in tenth}
    for row in sequences:  # the published order is that of the ratings' times, also where we filled in
        times = [rated_at[row["user_id"], film] for film in row["item_id_list"]]
        assert all(before <= after for before, after in pairwise(times))
