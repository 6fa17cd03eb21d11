"""The index against brute force in plain numpy."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from recsys_dist import index
from recsys_dist.config import rng_for
from recsys_dist.errors import BundleError
from recsys_dist.index import Exact, Index, IndexConfig, Ivf

ROWS, DIM, K = 3_000, 16, 40


def clustered(rows: int, *key: str, of_length_1: bool = True) -> np.ndarray:
    """Vectors around 30 centres, the same ones for every key."""
    centres, rng = rng_for(0, "centres").normal(size=(30, DIM)), rng_for(0, *key)
    vectors = centres[rng.integers(0, 30, rows)] + 0.5 * rng.normal(size=(rows, DIM))
    length = np.linalg.norm(vectors, axis=1, keepdims=True) if of_length_1 else 1.0
    return (vectors / length).astype(np.float32)


VECTORS, QUERIES = clustered(ROWS, "items"), clustered(20, "queries")
IVF = IndexConfig(exact_rows=0, recall=0.99, recall_at=200)


@pytest.fixture(scope="module")
def ivf() -> Ivf:
    built = index.build(VECTORS, IVF, clustered(200, "other queries"))
    assert isinstance(built, Ivf)
    return built


@pytest.fixture(scope="module")
def full(ivf: Ivf, tmp_path_factory: pytest.TempPathFactory) -> Ivf:
    """The same index looking at every list: it must find exactly what brute force does."""
    ivf.save(path := tmp_path_factory.mktemp("index") / "index.faiss")
    loaded = index.load(path, VECTORS)
    loaded.inverted.nprobe = loaded.inverted.nlist
    return loaded


@pytest.fixture(params=["exact", "ivf"])
def found_by(request: pytest.FixtureRequest) -> Index:
    return Exact(VECTORS) if request.param == "exact" else request.getfixturevalue("full")


def brute(query: np.ndarray, k: int, left: np.ndarray) -> list[int]:
    scores = VECTORS.astype(np.float64) @ query.astype(np.float64)
    rows = [row for row in sorted(range(1, ROWS), key=lambda row: (-scores[row], row)) if left[row]]
    return rows[:k] + [0] * (k - len(rows))


def test_the_best_items_in_order(found_by: Index) -> None:
    rows, scores = found_by.search(QUERIES, K)
    assert (rows.dtype, scores.dtype, rows.shape) == (np.int32, np.float32, (20, K))
    for query, found, score in zip(QUERIES, rows, scores, strict=True):
        assert found.tolist() == brute(query, K, np.ones(ROWS, bool))
        np.testing.assert_allclose(score, VECTORS[found] @ query, rtol=1e-5)


def test_filters_apply_before_the_cut(found_by: Index) -> None:
    everything = np.ones(ROWS, bool)
    best = [brute(query, 3 * K, everything) for query in QUERIES]
    excluded = [np.array(rows[: n * 3], np.int32) for n, rows in enumerate(best)]  # the first has none
    allowed = rng_for(0, "allowed").random(ROWS) < 0.1
    for mask in (None, allowed):
        rows, _ = found_by.search(QUERIES, K, excluded, mask)
        for query, found, without in zip(QUERIES, rows, excluded, strict=True):
            left = everything.copy() if mask is None else mask.copy()
            left[without] = False
            assert found.tolist() == brute(query, K, left)
    rows, _ = found_by.search(QUERIES, K, allowed=allowed)
    assert [found.tolist() for found in rows] == [brute(query, K, allowed) for query in QUERIES]


def test_where_fewer_are_left_the_rest_is_nothing(found_by: Index) -> None:
    allowed = np.zeros(ROWS, bool)
    allowed[[0, 5, 9]] = True  # the unknown item may not be found, whoever allows it
    rows, scores = found_by.search(QUERIES[:2], K, [np.array([9], np.int32), np.empty(0, np.int32)], allowed)
    assert rows[0].tolist() == [5] + [0] * (K - 1)
    assert sorted(rows[1, :2]) == [5, 9] and not rows[1, 2:].any()
    assert np.isneginf(scores[rows == 0]).all() and np.isfinite(scores[rows > 0]).all()
    rows, _ = found_by.search(QUERIES[:1], ROWS + 5)
    assert sorted(rows[0, : ROWS - 1]) == list(range(1, ROWS)) and not rows[0, ROWS - 1 :].any()


def test_equal_scores_come_by_row() -> None:
    vectors = np.ones((300, 4), np.float32)
    for found in (Exact(vectors), index.build(vectors, IVF.override(["recall_at=10"]))):
        rows, _ = found.search(np.ones((2, 4), np.float32), 300)
        assert rows.tolist() == [[*range(1, 300), 0]] * 2
    assert Exact(vectors).search(np.ones((1, 4), np.float32), 7)[0].tolist() == [[1, 2, 3, 4, 5, 6, 7]]


def test_as_many_lists_as_the_recall_needs(ivf: Ivf) -> None:
    assert 1 < ivf.inverted.nprobe < ivf.inverted.nlist
    assert index.recall(ivf, VECTORS, clustered(200, "fresh"), 200) >= 0.985
    careless = index.build(VECTORS, IVF.override(["recall=0.3"]))
    assert isinstance(careless, Ivf) and careless.inverted.nprobe < ivf.inverted.nprobe


def test_vectors_of_any_length_reach_the_recall_too() -> None:
    vectors = clustered(ROWS, "long", of_length_1=False) * rng_for(0, "l").uniform(0.1, 9, (ROWS, 1))
    vectors = vectors.astype(np.float32)
    asked = clustered(200, "asked", of_length_1=False)
    assert index.recall(index.build(vectors, IVF, asked), vectors, asked, 200) >= 0.99


def test_small_catalogues_are_searched_exactly() -> None:
    assert isinstance(index.build(VECTORS), Exact)


def test_an_index_is_built_alike_again_and_survives_a_file(ivf: Ivf, tmp_path: Path) -> None:
    again = index.build(VECTORS, IVF, clustered(200, "other queries"))
    assert isinstance(again, Ivf)
    for name, built in (("a", ivf), ("b", again)):
        built.save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    loaded = index.load(tmp_path / "a", VECTORS)
    for one, other in zip(loaded.search(QUERIES, K), ivf.search(QUERIES, K), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:50], "is no faiss index"),
        (lambda content: b"{}" + content, "is no faiss index"),
        (lambda content: content, r"of \(3000, 16\), the item vectors are \(7, 16\)"),
    ],
)
def test_another_file_is_refused(
    ivf: Ivf, tmp_path: Path, damage: Callable[[bytes], bytes], said: str
) -> None:
    ivf.save(tmp_path / "index.faiss")
    (tmp_path / "index.faiss").write_bytes(damage((tmp_path / "index.faiss").read_bytes()))
    with pytest.raises(BundleError, match=said):
        index.load(tmp_path / "index.faiss", VECTORS[:7])


def test_overlap_by_hand() -> None:
    found, truth = np.array([[1, 2, 0], [3, 0, 0]]), np.array([[2, 1, 5], [4, 0, 0]])
    assert index.overlap(found, truth) == 2 / 4
