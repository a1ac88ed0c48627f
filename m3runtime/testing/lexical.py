"""`LexicalContract`: the laws of every `LexicalIndex`."""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import pytest

from m3runtime.errors import IndexFileError
from m3runtime.memory.block import as_ids
from m3runtime.retrieval.lexical import LexicalIndex
from m3runtime.testing.threads import together

TEXTS = {
    3: "The ferry to Brannoch sails on every day but Tuesday.",
    4: "Error E-4012/B: the pump of unit QX77 has no oil.",
    9: "Error E-4013/B: the pump of unit QX78 has no oil.",
    2**63 + 1: "read_file(path) opens a file; readFile is its older name.",
    12: "北京大学的图书馆有三百万册书。",
    13: "東京の図書館は月曜日に休みです。",
    17: "Die Fähre nach Bränoch fährt täglich außer dienstags.",
    20: "The the the of of of and and.",
}
"""Texts of several scripts, with names, numbers and codes."""


class LexicalContract(ABC):
    """The laws of `LexicalIndex`. Subclass it as ``TestMyIndex`` and make an empty index."""

    @abstractmethod
    def make_index(self) -> LexicalIndex:
        """An empty index; all calls make equal ones."""

    def filled(self) -> LexicalIndex:
        """An index of `TEXTS`."""
        index = self.make_index()
        index.add(as_ids(list(TEXTS)), list(TEXTS.values()))
        return index

    @staticmethod
    def found(index: LexicalIndex, text: str, k: int = 9, among: list[int] | None = None) -> list[tuple[int, float]]:
        """The ids and scores for one text, checked for form and order."""
        ((ids, scores),) = index.search([text], k, None if among is None else as_ids(among))
        assert ids.dtype == np.uint64
        assert scores.dtype == np.float32
        assert ids.shape == scores.shape
        assert len(ids) <= k
        assert (scores > 0).all()
        pairs = list(zip(ids.tolist(), scores.tolist(), strict=True))
        assert pairs == sorted(pairs, key=lambda pair: (-pair[1], pair[0]))
        return pairs

    @pytest.mark.parametrize(
        ("text", "best"),
        [
            ("When does the ferry to brannoch sail?", 3),
            ("what means E-4012", 4),
            ("unit qx78", 9),
            ("READ_FILE", 2**63 + 1),
            ("the file that is read", 2**63 + 1),
            ("北京的图书馆", 12),
            ("図書館", 13),
            ("fahre ausser Dienstags", 17),
        ],
    )
    def test_finds_names_numbers_and_scripts(self, text: str, best: int) -> None:
        assert self.found(self.filled(), text)[0][0] == best

    @pytest.mark.parametrize("text", ["", " \n", "?!", "zebra"])
    def test_what_shares_no_word_is_not_found(self, text: str) -> None:
        assert self.found(self.filled(), text) == []

    def test_an_empty_index_finds_nothing(self) -> None:
        index = self.make_index()
        assert self.found(index, "ferry") == []
        assert (len(index), index.ids().tolist()) == (0, [])
        index.add(as_ids([]), [])
        index.remove(as_ids([1]))
        assert index.search([], 5) == []

    def test_k_bounds_what_is_found(self) -> None:
        index = self.filled()
        everything = self.found(index, "the pump of the ferry")
        assert len(everything) >= 4
        assert [self.found(index, "the pump of the ferry", k) for k in range(4)] == [everything[:k] for k in range(4)]

    def test_equal_texts_come_in_order_of_ids(self) -> None:
        index = self.make_index()
        ids = [9, 2, 30, 2**63, 11]
        index.add(as_ids(ids), ["one lamp"] * len(ids))
        for k in (1, 3, 9):
            assert [id for id, _ in self.found(index, "lamp", k)] == sorted(ids)[:k]

    def test_results_depend_neither_on_order_nor_on_what_was_removed(self) -> None:
        index, parts = self.make_index(), list(TEXTS)
        index.add(as_ids([1000, 1001]), ["the ferry of oil", "zanzibar"])
        for id in reversed(parts):
            index.add(as_ids([id]), [TEXTS[id]])
        index.add(as_ids([parts[0]]), ["an id that is held is passed over"])
        index.remove(as_ids([1000, 1001, 77]))
        assert index.ids().tolist() == sorted(parts)
        assert len(index) == len(parts)
        for text in [*TEXTS.values(), "zanzibar"]:
            expected = self.found(self.filled(), text)
            assert [id for id, _ in self.found(index, text)] == [id for id, _ in expected]
            assert [score for _, score in self.found(index, text)] == pytest.approx([score for _, score in expected])

    def test_a_search_among_ids_finds_what_the_whole_search_finds_of_them(self) -> None:
        index = self.make_index()
        rng = np.random.default_rng(0)
        ids = np.arange(0, 4000, 2, dtype=np.uint64)
        index.add(ids, [" ".join(f"w{word}" for word in rng.integers(0, 60, 12)) for _ in ids])
        text = "w1 w2 w3"
        whole = self.found(index, text, len(ids))
        for share in (1e-3, 0.01, 0.3, 1):
            some = np.sort(rng.permutation(4000)[: round(share * 4000)]).tolist()
            assert self.found(index, text, 7, some) == [pair for pair in whole if pair[0] in set(some)][:7]
        assert self.found(index, text, 7, []) == []

    def test_save_and_load(self, tmp_path: Path) -> None:
        index = self.filled()
        index.remove(as_ids([4]))
        (tmp_path / "file").write_bytes(bytes(1 << 16))
        index.save(tmp_path / "file")
        data = (tmp_path / "file").read_bytes()
        assert b"4012" not in data
        assert b"QX77" not in data.upper()
        other = self.make_index()
        other.add(as_ids([5]), ["it held something"])
        other.load(memoryview(data))
        assert other.ids().tolist() == index.ids().tolist()
        for text in TEXTS.values():
            assert dict(self.found(other, text)) == pytest.approx(dict(self.found(index, text)))
        other.add(as_ids([4]), [TEXTS[4]])
        assert dict(self.found(other, "QX77")) == pytest.approx(dict(self.found(self.filled(), "QX77")))

    def test_an_empty_index_is_saved(self, tmp_path: Path) -> None:
        self.make_index().save(tmp_path / "file")
        index = self.filled()
        index.load(memoryview((tmp_path / "file").read_bytes()))
        assert len(index) == 0

    @pytest.mark.parametrize("data", [b"", b"{}\n", b"usearch" * 99, b'{"format": "another"}\n'])
    def test_other_bytes_are_refused_and_change_nothing(self, data: bytes) -> None:
        index = self.filled()
        with pytest.raises(IndexFileError):
            index.load(memoryview(data))
        assert self.found(index, "QX77")

    def test_threads_search_while_others_add_and_remove(self) -> None:
        index = self.filled()
        expected = {id for id, _ in self.found(index, "QX77 ferry")}

        def work(number: int) -> None:
            mine = as_ids(range(100 * number + 100, 100 * number + 150))
            for _ in range(5):
                if number % 2:
                    index.add(mine, ["ferry boat"] * len(mine))
                    index.remove(mine)
                else:
                    assert expected <= {id for id, _ in self.found(index, "QX77 ferry", 1000)}

        together(4, work)
        assert index.ids().tolist() == sorted(TEXTS)
