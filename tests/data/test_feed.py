import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from recsys_dist import session
from recsys_dist.data.feed import Feed
from recsys_dist.data.order import Piece, cut, deal, newest_rows, shuffled, stored, untrained, with_trained
from recsys_dist.errors import DataError


@pytest.fixture(scope="module")
def cluster():
    session.connect(cpus=1)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[tuple[str, int]]:
    folder = tmp_path_factory.mktemp("shards")
    made = []
    for number, rows in enumerate([100, 3, 57]):
        row_id = (number << 32) + np.arange(rows)
        lists = pa.array([[n] * (n % 3) for n in range(rows)], pa.list_(pa.int32()))
        pq.write_table(pa.table({"row_id": row_id, "lists": lists}), folder / f"part-{number:05d}.parquet")
        made.append((str(folder / f"part-{number:05d}.parquet"), rows))
    return made


def row_ids(tables) -> list[list[int]]:
    return [table["row_id"].to_pylist() for table in tables]


def flat(lists: list[list]) -> list:
    return list(itertools.chain.from_iterable(lists))


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_epochs_follow_each_other_with_full_batches_and_every_row_once(files):
    epochs = [shuffled(stored(files, ["row_id", "weight"]), 5, epoch) for epoch in (1, 2, 3)]
    feed = Feed([piece for epoch in epochs for piece in epoch])
    found = [row_ids(feed.take(epoch, 48)) for epoch in epochs]
    everything = sorted((number << 32) + row for number, (_, rows) in enumerate(files) for row in range(rows))
    for batches in found:
        assert [len(batch) for batch in batches] == [48, 48, 48, 16]
        assert sorted(flat(batches)) == everything
    assert len({tuple(flat(batches)) for batches in found}) == 3
    again = Feed(epochs[1])
    assert row_ids(again.take(epochs[1], 48)) == found[1]


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_workers_share_an_epoch(files):
    epoch = shuffled(stored(files, ["row_id"]), 0, 1)
    found = [flat(row_ids(Feed(share).take(share, 16))) for share in deal(epoch, [1] * 3)]
    assert flat(found) == flat(row_ids(Feed(epoch).take(epoch, 16)))
    assert sorted(map(len, found)) == [53, 53, 54]


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_an_interrupted_epoch_goes_on_with_the_rows_that_are_left(files):
    epoch = shuffled(stored(files, ["row_id"]), 0, 1)
    before = [cut(share, 20)[0] for share in deal(epoch, [1] * 3)]
    left = deal(untrained(epoch, with_trained({}, flat(before))), [1] * 2)
    found = [flat(row_ids(Feed(part).take(part, 16))) for part in [*before, *left]]
    assert list(map(len, found)) == [20, 20, 20, 50, 50]
    assert sorted(flat(found)) == sorted(flat(row_ids(Feed(epoch).take(epoch, 16))))


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_lists_travel_with_their_rows(files):
    share = shuffled(stored(files[:1]), 0, 1)
    [table] = Feed(share).take(share, 1000)
    for row_id, values in zip(table["row_id"].to_pylist(), table["lists"].to_pylist(), strict=True):
        assert values == [row_id] * (row_id % 3)


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("damage", ["missing", "cut", "short", "long"])
def test_a_damaged_shard_is_named(tmp_path, files, damage):
    file = tmp_path / "part-00009.parquet"
    content = Path(files[0][0]).read_bytes()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    rows = {"short": 101, "long": 99}.get(damage, 100)
    piece = Piece(str(file), 0, min(rows, 50), of=rows) if damage == "long" else Piece(str(file), 0, rows)
    with pytest.raises(DataError, match=r"part-00009\.parquet"):
        list(Feed([piece]).take([piece], 8))


@pytest.fixture(scope="module")
def timed(tmp_path_factory) -> list[tuple[str, int]]:
    """Rows of ten days, mixed over three shards; `row_id` is the hour."""
    folder = tmp_path_factory.mktemp("timed")
    hours = np.random.default_rng(0).permutation(240)
    made = []
    for number, mine in enumerate(np.split(hours, [100, 103])):
        times = pa.array(mine * 3_600_000_000, pa.timestamp("us", tz="UTC"))
        pq.write_table(pa.table({"row_id": mine, "timestamp": times}), folder / f"part-{number:05d}.parquet")
        made.append((str(folder / f"part-{number:05d}.parquet"), len(mine)))
    return made


@pytest.mark.parametrize("fraction", [1 / 16, 0.25, 0.5, 0.99])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_the_newest_rows_are_those_and_no_others(timed, fraction, workers):
    files, since = newest_rows(timed, fraction)
    shares = deal(shuffled(stored(files, ["row_id"], since), 0, 1), [1] * workers)
    hours = flat(flat([row_ids(Feed(share).take(share, 7)) for share in shares]))
    wanted = int(np.ceil(fraction * 240))
    assert sorted(hours) == list(range(240 - wanted, 240))
