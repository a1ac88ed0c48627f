"""`IndexContract`: the laws of every `Index`, checked against brute force in numpy."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from m3runtime.testing.blocks import LAST_ID, make_ids
from m3runtime.testing.index_files import IndexFileLaws
from m3runtime.testing.index_laws import IndexLaws, brute_force, unit_vectors

__all__ = ["IndexContract", "SearchLaws", "brute_force", "unit_vectors"]


class SearchLaws(IndexLaws):
    """The laws of searching, adding and removing: all that a `HomeIndex` has to keep.

    The index of such a subclass puts what it is given by `Index.add` into a home before it holds it.
    """

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

    @pytest.mark.parametrize("k", [0, 3, 100])
    def test_a_search_among_ids_finds_what_brute_force_over_them_finds(self, k: int) -> None:
        index, ids, vectors = self.filled()
        queries = unit_vectors(4, self.dim, seed=5)
        some = np.arange(0, len(ids), 3)
        asked = np.sort(np.append(ids[some], np.uint64(2)))  # no index has id 2
        found, scores = index.search_among(asked, queries, k)
        assert found.shape == scores.shape == (4, min(k, len(some)))
        assert (np.diff(scores, axis=1) <= 0).all()
        for row, query in enumerate(queries):
            own = dict(zip(ids.tolist(), (vectors @ query).tolist(), strict=True))
            best = sorted((own[id] for id in ids[some].tolist()), reverse=True)
            assert set(found[row].tolist()) <= set(ids[some].tolist())
            assert len(set(found[row].tolist())) == found.shape[1]
            assert [own[id] for id in found[row].tolist()] == pytest.approx(scores[row], abs=self.score_tolerance)
            assert scores[row] == pytest.approx(best[:k], abs=self.score_tolerance)

    @pytest.mark.parametrize("share", [1, 0.5, 0.01, 0.001])
    def test_a_search_among_any_share_of_ids_is_exact(self, share: float) -> None:
        index, ids, vectors = self.filled(count=3000)
        queries = unit_vectors(3, self.dim, seed=5)
        # The farthest pass, so that the nearest of all are none of them.
        for passing in (
            np.arange(round(share * len(ids))),
            np.argsort(vectors @ queries[0])[: round(share * len(ids))],
        ):
            found, scores = index.search_among(np.sort(ids[passing]), queries, 5)
            assert found.shape == (3, min(5, len(passing)))
            for row, query in enumerate(queries):
                best, best_scores = brute_force(ids[passing], vectors[passing], query)
                own = dict(zip(best.tolist(), best_scores.tolist(), strict=True))
                assert [own[id] for id in found[row].tolist()] == pytest.approx(scores[row], abs=self.score_tolerance)
                assert scores[row] == pytest.approx(best_scores[:5], abs=self.score_tolerance)

    def test_equal_scores_among_ids_come_in_order_of_ids(self) -> None:
        index = self.make_index()
        ids = np.arange(1000, dtype=np.uint64)
        index.add(ids, np.repeat(unit_vectors(1, self.dim), len(ids), axis=0))
        assert index.search_among(ids[3:], unit_vectors(1, self.dim), 3)[0].tolist() == [[3, 4, 5]]

    def test_a_search_among_ids_that_are_not_held_finds_nothing(self) -> None:
        index, ids, vectors = self.filled()
        index.remove(ids[:1])
        assert index.search_among(ids[:1], vectors[:2], 5)[0].shape == (2, 0)
        assert index.search_among(ids[:0], vectors[:2], 5)[0].shape == (2, 0)

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

    def test_an_id_twice_in_one_removal(self) -> None:
        index, ids, vectors = self.filled(count=8)
        index.remove(np.concatenate([ids[:2], ids[:2]]))
        assert len(index) == 6
        self.assert_agrees(index, ids[2:], vectors[2:], k=6)

    def test_thousands_at_once(self) -> None:
        index, ids, vectors = self.filled(count=3000)
        assert len(index) == 3000
        self.assert_agrees(index, ids, vectors, k=20)
        found, _ = index.search(vectors, 1)
        assert found.shape == (3000, 1)
        index.remove(ids[10:])
        self.assert_agrees(index, ids[:10], vectors[:10], k=10)

    def test_keeps_its_own_copy(self) -> None:
        index, ids, vectors = self.make_index(), make_ids(3, 1, 2), unit_vectors(3, self.dim)
        given_ids, given = ids.copy(), vectors.copy()
        index.add(given_ids, given)
        given_ids[:] = LAST_ID
        given[:] = given[::-1].copy()
        found, scores = index.search(vectors, 2)
        found[:], scores[:] = 0, 0
        index.ids()[:] = 0
        self.assert_agrees(index, ids, vectors, k=3)

    def test_vectors_may_lie_apart(self) -> None:
        index, ids, vectors = self.make_index(), make_ids(3, 1, 2), unit_vectors(6, self.dim)[::2]
        index.add(ids, vectors)
        self.assert_agrees(index, ids, vectors, k=3)

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


class IndexContract(SearchLaws, IndexFileLaws):
    """The laws of `Index`. Subclass it as ``TestMyIndex`` and make the index: see `IndexLaws`."""
