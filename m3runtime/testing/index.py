"""`IndexContract`: what every `Index` must do, checked against brute force in numpy."""

import threading
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from m3runtime.block import Ids
from m3runtime.errors import IndexFileError
from m3runtime.retrieval import Index, Vectors

STAMP = "0123456789abcdef0123456789abcdef"
Oracle = tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64]]


def unit_vectors(count: int, dim: int, seed: int = 0) -> Vectors:
    """``float32[count, dim]`` of length 1, in directions that are all equally likely."""
    vectors = np.random.default_rng(seed).standard_normal((count, dim))
    unit: Vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def brute_force(ids: Ids, vectors: Vectors, query: Vectors) -> Oracle:
    """All ids and their cosine to one query in float64, highest first, equal ones by ascending id."""
    scores = vectors.astype(np.float64) @ query.astype(np.float64)
    order = np.lexsort((ids, -scores))
    return ids[order], scores[order]


class IndexContract(ABC):
    """Laws of `Index`. A subclass makes an empty index; all its calls must make equal ones.

    ``score_tolerance`` is how far a score may lie from the exact cosine, for an index that stores rounded
    vectors.
    """

    dim = 16
    score_tolerance = 1e-5

    @abstractmethod
    def make_index(self) -> Index:
        """An empty index of ``self.dim`` dimensions that finds exactly, at this size, what is nearest."""

    def filled(self, count: int = 50, seed: int = 0) -> tuple[Index, Ids, Vectors]:
        """An index with ``count`` random vectors, whose ids are neither dense nor in order."""
        ids = np.random.default_rng(seed).permutation(count).astype(np.uint64) * np.uint64(7) + np.uint64(3)
        vectors = unit_vectors(count, self.dim, seed)
        index = self.make_index()
        index.add(ids, vectors)
        return index, ids, vectors

    def assert_agrees(self, index: Index, ids: Ids, vectors: Vectors, k: int) -> None:
        """Assert that a search gives what brute force over ``ids`` and ``vectors`` gives."""
        queries = unit_vectors(8, self.dim, seed=99)
        found, scores = index.search(queries, k)
        assert found.dtype == np.uint64
        assert scores.dtype == np.float32
        assert found.shape == scores.shape == (len(queries), min(k, len(ids)))
        for row, query in enumerate(queries):
            all_ids, all_scores = brute_force(ids, vectors, query)
            own = dict(zip(all_ids.tolist(), all_scores.tolist(), strict=True))
            assert len(set(found[row].tolist())) == found.shape[1]
            for place, (id, score) in enumerate(zip(found[row].tolist(), scores[row].tolist(), strict=True)):
                assert score == pytest.approx(own[id], abs=self.score_tolerance)
                # Rounding may swap neighbours, but never one for something that is clearly farther.
                assert own[id] == pytest.approx(all_scores[place], abs=2 * self.score_tolerance)
            assert (np.diff(scores[row]) <= 0).all()
            assert (np.abs(scores[row]) <= 1).all()

    @pytest.mark.parametrize("k", [1, 5, 50])
    def test_finds_what_brute_force_finds(self, k: int) -> None:
        self.assert_agrees(*self.filled(), k)

    def test_k_beyond_the_size_gives_everything(self) -> None:
        self.assert_agrees(*self.filled(count=7), k=100)

    def test_k_of_zero_gives_nothing(self) -> None:
        index, _, vectors = self.filled()
        ids, scores = index.search(vectors[:3], 0)
        assert ids.shape == scores.shape == (3, 0)

    def test_no_queries_give_no_rows(self) -> None:
        index, _, _ = self.filled()
        ids, scores = index.search(np.zeros((0, self.dim), np.float32), 5)
        assert ids.shape == scores.shape == (0, 5)

    def test_empty_index_finds_nothing(self) -> None:
        index = self.make_index()
        ids, scores = index.search(unit_vectors(2, self.dim), 5)
        assert ids.shape == scores.shape == (2, 0)
        assert len(index) == 0
        assert index.ids().tolist() == []

    def test_adding_and_removing_nothing_is_fine(self) -> None:
        index = self.make_index()
        index.add(np.zeros(0, np.uint64), np.zeros((0, self.dim), np.float32))
        index.remove(np.zeros(0, np.uint64))
        assert len(index) == 0

    def test_one_row_and_many_rows_agree(self) -> None:
        index, _, _ = self.filled()
        queries = unit_vectors(9, self.dim, seed=5)
        ids, _ = index.search(queries, 5)
        alone = np.concatenate([index.search(query[None], 5)[0] for query in queries])
        assert np.array_equal(ids, alone)

    def test_equal_scores_come_in_order_of_ids(self) -> None:
        index = self.make_index()
        vector = unit_vectors(1, self.dim)
        ids = np.array([9, 2, 30, 4, 11, 1], np.uint64)
        index.add(ids, np.repeat(vector, len(ids), axis=0))
        for k in (1, 3, 6):
            assert index.search(vector, k)[0].tolist() == [sorted(ids.tolist())[:k]]

    def test_scores_of_itself_and_its_opposite(self) -> None:
        index = self.make_index()
        vector = unit_vectors(1, self.dim)
        index.add(np.array([1, 2], np.uint64), np.concatenate([vector, -vector]))
        ids, scores = index.search(vector, 2)
        assert ids.tolist() == [[1, 2]]
        assert scores[0].tolist() == pytest.approx([1, -1], abs=self.score_tolerance)

    def test_an_id_that_is_there_is_passed_over(self) -> None:
        index, ids, vectors = self.filled()
        index.add(ids[:10], unit_vectors(10, self.dim, seed=1))
        self.assert_agrees(index, ids, vectors, k=5)

    def test_an_id_twice_in_one_call_is_held_once(self) -> None:
        index = self.make_index()
        index.add(np.array([4, 4], np.uint64), unit_vectors(2, self.dim))
        assert index.ids().tolist() == [4]

    def test_ids_at_both_ends_of_the_range(self) -> None:
        ids = np.array([0, 2**64 - 1, 2**63, 2**32], np.uint64)
        vectors = unit_vectors(4, self.dim)
        index = self.make_index()
        index.add(ids, vectors)
        self.assert_agrees(index, ids, vectors, k=4)
        assert index.ids().tolist() == sorted(ids.tolist())
        index.remove(ids[:2])
        self.assert_agrees(index, ids[2:], vectors[2:], k=4)

    def test_removed_ids_are_absent(self) -> None:
        index, ids, vectors = self.filled()
        index.remove(ids[::3])
        kept = np.ones(len(ids), np.bool_)
        kept[::3] = False
        assert len(index) == kept.sum()
        assert index.ids().tolist() == sorted(ids[kept].tolist())
        self.assert_agrees(index, ids[kept], vectors[kept], k=len(ids))

    def test_removing_unknown_ids_changes_nothing(self) -> None:
        index, ids, vectors = self.filled()
        index.remove(np.array([0, 1, 2**64 - 1], np.uint64))
        self.assert_agrees(index, ids, vectors, k=5)

    def test_everything_removed_and_added_again(self) -> None:
        index, ids, vectors = self.filled()
        index.remove(ids)
        assert len(index) == 0
        assert index.search(vectors[:1], 5)[0].shape == (1, 0)
        index.add(ids, vectors[::-1])
        self.assert_agrees(index, ids, vectors[::-1], k=5)

    def test_save_and_load(self, tmp_path: Path) -> None:
        index, ids, vectors = self.filled()
        index.remove(ids[:5])
        index.save(tmp_path / "index", STAMP)
        loaded = self.make_index()
        loaded.add(ids[:1], vectors[:1])
        loaded.load(tmp_path / "index", STAMP)
        self.assert_agrees(loaded, ids[5:], vectors[5:], k=5)
        more = unit_vectors(3, self.dim, seed=2)
        loaded.add(ids[:3], more)
        joined = np.concatenate([ids[5:], ids[:3]]), np.concatenate([vectors[5:], more])
        self.assert_agrees(loaded, *joined, k=5)

    def test_save_and_load_an_empty_index(self, tmp_path: Path) -> None:
        self.make_index().save(tmp_path / "index", STAMP)
        index, ids, vectors = self.filled()
        index.load(tmp_path / "index", STAMP)
        assert len(index) == 0
        index.add(ids, vectors)
        self.assert_agrees(index, ids, vectors, k=5)

    def test_saving_again_replaces_the_file_and_leaves_no_other(self, tmp_path: Path) -> None:
        index, ids, vectors = self.filled()
        index.save(tmp_path / "index", STAMP)
        before = sorted(path.name for path in tmp_path.iterdir())
        index.remove(ids[:1])
        index.save(tmp_path / "index", STAMP)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        loaded = self.make_index()
        loaded.load(tmp_path / "index", STAMP)
        self.assert_agrees(loaded, ids[1:], vectors[1:], k=5)

    def test_absent_file(self, tmp_path: Path) -> None:
        with pytest.raises(IndexFileError, match="nowhere"):
            self.make_index().load(tmp_path / "nowhere", STAMP)

    def test_foreign_stamp(self, tmp_path: Path) -> None:
        index, ids, vectors = self.filled()
        index.save(tmp_path / "index", STAMP)
        with pytest.raises(IndexFileError, match="stamp"):
            index.load(tmp_path / "index", "f" * 32)
        self.assert_agrees(index, ids, vectors, k=5)

    def test_one_flipped_byte_anywhere(self, tmp_path: Path) -> None:
        index, ids, vectors = self.filled(count=10)
        index.save(tmp_path / "index", STAMP)
        for path in sorted(tmp_path.iterdir()):
            good = path.read_bytes()
            with path.open("r+b", buffering=0) as file:
                for place, byte in enumerate(good):
                    file.seek(place)
                    file.write(bytes([byte ^ 1 << (place % 8)]))
                    with pytest.raises(IndexFileError):
                        index.load(tmp_path / "index", STAMP)
                    file.seek(place)
                    file.write(bytes([byte]))
        index.load(tmp_path / "index", STAMP)
        self.assert_agrees(index, ids, vectors, k=5)

    def test_cut_or_extended_files(self, tmp_path: Path) -> None:
        index, ids, vectors = self.filled(count=10)
        index.save(tmp_path / "index", STAMP)
        for path in sorted(tmp_path.iterdir()):
            good = path.read_bytes()
            for bad in (
                b"",
                good[:1],
                good[: len(good) // 2],
                good[:-1],
                good[1:],
                good + b"\0",
                b"\0" * 999,
            ):
                path.write_bytes(bad)
                with pytest.raises(IndexFileError):
                    index.load(tmp_path / "index", STAMP)
            path.write_bytes(good)
        self.assert_agrees(index, ids, vectors, k=5)

    def test_threads_search_while_others_add_and_remove(self) -> None:
        index, ids, vectors = self.filled(count=40)
        passing = np.arange(10_000, 10_200, dtype=np.uint64)
        done = threading.Event()

        def search() -> int:
            searches = 0
            while not done.is_set() or not searches:
                # What stays is found, whatever comes and goes meanwhile.
                found, scores = index.search(vectors[:4], 1_000)
                assert (np.diff(scores, axis=1) <= 0).all()
                for row in found.tolist():
                    assert len(set(row)) == len(row)
                    assert set(ids.tolist()) <= set(row)
                searches += 1
            return searches

        def change(part: int) -> None:
            mine = passing[part::4]
            for seed in range(10):
                index.add(mine, unit_vectors(len(mine), self.dim, seed))
                index.remove(mine)

        with ThreadPoolExecutor(8) as pool:
            searching = [pool.submit(search) for _ in range(4)]
            changing = [pool.submit(change, part) for part in range(4)]
            try:
                for task in changing:
                    task.result()
            finally:
                done.set()
            assert all(task.result() for task in searching)
        self.assert_agrees(index, ids, vectors, k=5)
