import random

import pytest

from recsys_dist.data.order import Piece, cut, deal, evenly, shuffled, stored, untrained, with_trained

FILES = [("a", 10), ("b", 1), ("c", 7), ("d", 0), ("e", 5)]
ROWS = [(file, row) for file, size in FILES for row in range(size)]


def positions(pieces: list[Piece]) -> list[tuple[str, int]]:
    return [(piece.file, row) for piece in pieces for row in range(piece.start, piece.stop)]


@pytest.mark.parametrize("workers", [1, 2, 3, 7, 40])
def test_shares_differ_by_a_row_at_most_and_hold_every_row_once(workers):
    shares = deal(stored(FILES), [1] * workers)
    assert [row for share in shares for row in positions(share)] == ROWS
    sizes = [sum(p.rows for p in share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_the_order_is_a_function_of_seed_and_epoch():
    pieces = [Piece(str(n), 0, 1) for n in range(20)]
    assert shuffled(pieces, 1, 2) == shuffled(pieces, 1, 2)
    orders = {tuple(p.file for p in shuffled(pieces, seed, epoch)) for seed in (1, 2) for epoch in (1, 2)}
    assert len(orders) == 4
    assert all(sorted(map(int, order)) == list(range(20)) for order in orders)


def test_rows_are_drawn_by_seed_epoch_and_shard_wherever_the_data_are():
    def drawn(file: str, seed: int, epoch: int) -> tuple[int, ...]:
        order = Piece(file, 3, 9, seed=seed, epoch=epoch).permutation(20)
        assert sorted(order) == list(range(20))
        return tuple(order)

    here = drawn("/here/ranking/train/part-00001.parquet", 1, 1)
    assert drawn("/there/else/ranking/train/part-00001.parquet", 1, 1) == here
    others = [
        ("/here/ranking/train/part-00002.parquet", 1, 1),
        ("/here/ranking/valid/part-00001.parquet", 1, 1),
    ]
    others += [("/here/ranking/train/part-00001.parquet", *key) for key in [(2, 1), (1, 2)]]
    assert len({here, *(drawn(*other) for other in others)}) == 5
    assert Piece("a", 0, 5).permutation(5) is None, "stored order"


@pytest.mark.parametrize("seed", range(40))
def test_any_interruptions_at_any_worker_counts_train_every_row_once(seed):
    """Workers take batches of their shares, are stopped after some steps, and go on from the position."""
    draw = random.Random(seed)
    epoch, trained, seen = shuffled(stored(FILES), seed, 1), {}, []
    while left := untrained(epoch, trained):
        shares = deal(left, evenly(draw.randint(4, 9), draw.randint(1, 4)))
        rows = draw.randint(1, 3) * draw.randint(0, 4)
        done = [piece for share in shares for piece in cut(share, rows)[0]]
        seen += positions(done)
        trained = with_trained(trained, done)
    assert sorted(seen) == sorted(ROWS)
    assert trained == {file: [(0, size)] for file, size in FILES if size}, "and the intervals have met"


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_rows", [4, 5, 6, 7, 8, 12])
def test_as_many_workers_as_before_go_on_with_their_own_shares(workers, batch_rows):
    epoch, parts = shuffled(stored(FILES), 0, 1), evenly(batch_rows, workers)
    assert sum(parts) == batch_rows and max(parts) - min(parts) <= 1
    shares = deal(epoch, parts)
    for steps in range(9):
        done = [p for share, part in zip(shares, parts, strict=True) for p in cut(share, steps * part)[0]]
        again = deal(untrained(epoch, with_trained({}, done)), parts)
        rest = [cut(share, steps * part)[1] for share, part in zip(shares, parts, strict=True)]
        assert list(map(positions, again)) == list(map(positions, rest))
