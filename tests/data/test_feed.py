import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from recsys_dist.data.feed import Feed, Piece, deal, newest_rows, shuffled
from recsys_dist.errors import DataError

FILES = [("a", 10), ("b", 1), ("c", 7), ("d", 0), ("e", 5)]


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 40])
def test_shares_differ_by_a_row_at_most_and_hold_every_row_once(workers):
    shares = deal(FILES, [], workers)
    rows = [(p.file, row) for share in shares for p in share for row in range(p.start, p.stop)]
    assert rows == [(file, row) for file, size in FILES for row in range(size)]
    sizes = [sum(p.rows for p in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_the_order_is_a_function_of_seed_and_epoch():
    share = [Piece(str(n), 0, 1) for n in range(20)]
    assert shuffled(share, 1, 2) == shuffled(share, 1, 2)
    orders = {tuple(p.file for p in shuffled(share, seed, epoch)) for seed in (1, 2) for epoch in (1, 2)}
    assert len(orders) == 4
    assert all(sorted(map(int, order)) == list(range(20)) for order in orders)


@pytest.fixture(scope="module")
def cluster():
    ray.init(address="local", num_cpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
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
    [share] = deal(files, ["row_id", "weight"], 1)
    epochs = [shuffled(share, 5, epoch) for epoch in (1, 2, 3)]
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
    shares = deal(files, ["row_id"], 3)
    found = [flat(row_ids(Feed(shuffled(s, 0, 1)).take(s, 16))) for s in shares]
    assert sorted(flat(found)) == sorted(flat(row_ids(Feed(flat(shares)).take(flat(shares), 16))))
    assert sorted(map(len, found)) == [53, 53, 54]


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
def test_lists_travel_with_their_rows(files):
    [share] = deal(files[:1], [], 1)
    [table] = Feed(shuffled(share, 0, 1)).take(share, 1000)
    for row_id, values in zip(table["row_id"].to_pylist(), table["lists"].to_pylist(), strict=True):
        assert values == [row_id] * (row_id % 3)


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("damage", ["missing", "cut", "short"])
def test_a_damaged_shard_is_named(tmp_path, files, damage):
    file = tmp_path / "part-00009.parquet"
    content = Path(files[0][0]).read_bytes()
    if damage != "missing":
        file.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    piece = Piece(str(file), 0, 101 if damage == "short" else 100)
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
    shares = [shuffled(share, 0, 1) for share in deal(files, ["row_id"], workers, since)]
    hours = flat(flat([row_ids(Feed(share).take(share, 7)) for share in shares]))
    wanted = int(np.ceil(fraction * 240))
    assert sorted(hours) == list(range(240 - wanted, 240))
