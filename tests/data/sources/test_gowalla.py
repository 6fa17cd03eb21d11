"""LightGCN's format: a visit's history is the user's other training visits; test's is all of train.txt."""

from pathlib import Path

import pyarrow.compute as pc
import pytest

from recsys_dist.data.sources.gowalla import Config, Source
from tests.data.sources.published import REAL, Made, events_of, gowalla, make

FOLDER = REAL / "gowalla"
USERS = ("0", "1", "2", "3")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(Source(Config.parse({**gowalla(tmp_path_factory.mktemp("gowalla")), "valid_fraction": 0.2})))


def published(user: str) -> set[str]:
    return {str((int(user) + 2 * n) % 20) for n in range(10)}


def test_what_validates_is_drawn_from_training_and_every_item_is_trained_on(made: Made) -> None:
    trained, held = ({(r["user_id"], r["item_id"]) for r in made.examples[of]} for of in ("train", "valid"))
    assert trained | held == {(user, item) for user in USERS for item in published(user)}
    assert not trained & held and len(trained) + len(held) == 40
    for user in USERS:
        assert 0 < sum(u == user for u, _ in held) <= 2
    assert {item for _, item in trained} == set(map(str, range(20)))


def test_the_history_is_every_other_visit_that_is_known(made: Made) -> None:
    trained: dict[str, set[str]] = {user: set() for user in USERS}
    for row in made.examples["train"]:
        trained[row["user_id"]].add(row["item_id"])
    for split in ("train", "valid"):
        for row in made.examples[split]:
            assert sorted(row["visited"]) == sorted(trained[row["user_id"]] - {row["item_id"]})
            assert row["weight"] == row["_ranking"] == 1
    for user, row in made.states["valid"].items():
        assert set(row["visited"]) == set(row["seen"]) == trained[user]
        assert set(row["truth"]) == published(user) - trained[user]
    for user, row in made.states["test"].items():
        assert set(row["visited"]) == set(row["seen"]) == published(user)
        assert len(row["visited"]) == len(row["seen"]) == 10
    assert {user: sorted(row["truth"]) for user, row in made.states["test"].items()} == {
        "0": ["1"],
        "1": ["0"],
        "3": ["2", "4"],
    }


def test_a_long_history_is_drawn_by_the_seed(tmp_path: Path) -> None:
    gowalla(tmp_path)
    drawn = []
    for seed in (0, 0, 1):
        made = make(Source(Config(path=str(tmp_path), max_length=4, seed=seed)))
        drawn.append({user: row["visited"] for user, row in made.states["test"].items()})
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(len(items) == 4 and set(items) < published(user) for user, items in drawn[0].items())
    assert any(items != sorted(items, key=int) for items in drawn[0].values())


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"Gowalla is not at {FOLDER}")
def test_the_real_gowalla() -> None:
    source = Source(Config(path=str(FOLDER)))
    events = events_of(source, ("train.txt", "test.txt"))
    train, valid, test = (row["counts"] for row in pc.value_counts(events["date"].sort()).to_pylist())
    assert (train + valid, test) == (810_128, 217_242)
    assert 0.095 < valid / (train + valid) < 0.105
    trained = events.filter(pc.equal(events["date"], pc.min(events["date"])))
    for table in (events, trained):
        assert pc.count_distinct(table["user_id"]).as_py() == 29_858
        assert pc.count_distinct(table["item_id"]).as_py() == 40_981
