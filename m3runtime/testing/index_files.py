"""The laws of saving and loading an index."""

import threading
from pathlib import Path

import numpy as np
import pytest

from m3runtime.errors import IndexFileError
from m3runtime.retrieval.index import Index
from m3runtime.testing.blocks import LAST_ID, make_ids
from m3runtime.testing.index_laws import IndexLaws, unit_vectors
from m3runtime.testing.threads import together


class IndexFileLaws(IndexLaws):
    """An index loads the bytes that an equal one saved."""

    def loaded(self, path: Path) -> Index:
        """A new index that loaded the file."""
        index = self.make_index()
        index.load(memoryview(path.read_bytes()))
        return index

    def test_save_and_load(self, tmp_path: Path) -> None:
        index, ids, vectors = self.filled()
        index.remove(ids[:5])
        index.save(tmp_path / "index")
        loaded = self.loaded(tmp_path / "index")
        self.assert_agrees(loaded, ids[5:], vectors[5:], k=5)
        more = unit_vectors(3, self.dim, seed=2)
        loaded.add(ids[:3], more)
        joined = np.concatenate([ids[5:], ids[:3]]), np.concatenate([vectors[5:], more])
        self.assert_agrees(loaded, *joined, k=5)

    def test_what_is_loaded_replaces_what_was_held(self, tmp_path: Path) -> None:
        index, ids, vectors = self.filled(count=8)
        index.save(tmp_path / "index")
        other = self.make_index()
        other.add(np.concatenate([ids[:1], ids[-1:] + np.uint64(1)]), unit_vectors(2, self.dim, seed=3))
        other.load(memoryview((tmp_path / "index").read_bytes()))
        self.assert_agrees(other, ids, vectors, k=8)

    def test_save_and_load_an_empty_index(self, tmp_path: Path) -> None:
        self.make_index().save(tmp_path / "index")
        index, ids, vectors = self.filled()
        index.load(memoryview((tmp_path / "index").read_bytes()))
        assert len(index) == 0
        index.add(ids, vectors)
        self.assert_agrees(index, ids, vectors, k=5)

    def test_saving_replaces_a_longer_file_and_leaves_no_other(self, tmp_path: Path) -> None:
        index, ids, vectors = self.filled()
        (tmp_path / "index").write_bytes(bytes(1 << 20))
        index.save(tmp_path / "index")
        assert [path.name for path in tmp_path.iterdir()] == ["index"]
        assert (tmp_path / "index").stat().st_size < 1 << 20
        self.assert_agrees(self.loaded(tmp_path / "index"), ids, vectors, k=5)

    def test_an_index_of_another_dim_is_refused(self, tmp_path: Path) -> None:
        index, _, _ = self.filled()
        index.save(tmp_path / "index")
        self.dim *= 2
        other, ids, vectors = self.filled()
        with pytest.raises(IndexFileError):
            other.load(memoryview((tmp_path / "index").read_bytes()))
        self.assert_agrees(other, ids, vectors, k=5)

    def test_ids_at_both_ends_are_saved(self, tmp_path: Path) -> None:
        index, ids, vectors = self.make_index(), make_ids(0, LAST_ID, 2**63), unit_vectors(3, self.dim)
        index.add(ids, vectors)
        index.save(tmp_path / "index")
        loaded = self.loaded(tmp_path / "index")
        assert loaded.ids().tolist() == sorted(ids.tolist())
        self.assert_agrees(loaded, ids, vectors, k=3)

    def test_threads_save_while_another_adds(self, tmp_path: Path) -> None:
        """The file holds the vectors of one instant."""
        index, ids, vectors = self.filled(count=40)
        adding = threading.Event()

        def work(number: int) -> None:
            if number == 0:
                for start in range(0, 40, 4):
                    index.add(ids[start : start + 4] + np.uint64(10_000), vectors[start : start + 4])
                adding.set()
                return
            for turn in range(5):
                path = tmp_path / f"index {number} {turn}"
                index.save(path)
                held = self.loaded(path).ids()
                assert set(ids.tolist()) <= set(held.tolist())
                assert (len(held) - 40) % 4 == 0

        together(3, work)
        assert adding.is_set()
        assert len(index) == 80
