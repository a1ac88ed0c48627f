"""The laws of the files of an index."""

import threading
from pathlib import Path

import numpy as np
import pytest

from m3runtime.errors import IndexFileError
from m3runtime.testing.blocks import LAST_ID, make_ids
from m3runtime.testing.index_laws import STAMP, IndexLaws, unit_vectors
from m3runtime.testing.threads import together


class IndexFileLaws(IndexLaws):
    """What was saved is loaded, and nothing else is."""

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

    def test_ids_at_both_ends_are_saved(self, tmp_path: Path) -> None:
        index, ids, vectors = self.make_index(), make_ids(0, LAST_ID, 2**63), unit_vectors(3, self.dim)
        index.add(ids, vectors)
        index.save(tmp_path / "index", STAMP)
        loaded = self.make_index()
        loaded.load(tmp_path / "index", STAMP)
        assert loaded.ids().tolist() == sorted(ids.tolist())
        self.assert_agrees(loaded, ids, vectors, k=3)

    def test_threads_save_while_another_adds(self, tmp_path: Path) -> None:
        """What is saved is what was held at one instant."""
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
                index.save(path, STAMP)
                loaded = self.make_index()
                loaded.load(path, STAMP)
                held = loaded.ids()
                assert set(ids.tolist()) <= set(held.tolist())
                assert (len(held) - 40) % 4 == 0

        together(3, work)
        assert adding.is_set()
        assert len(index) == 80
