"""`HomeContract`: the laws of a home."""

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3runtime.block import Ids
from m3runtime.errors import BankMissingError, InputError, TierClosedError, TierReadOnlyError
from m3runtime.testing.blocks import (
    DIM,
    LAST_ID,
    SLOT_BYTES,
    make_batch,
    make_embeddings,
    make_ids,
    make_reference,
)
from m3runtime.testing.tier import TierContract, check_read, together, write
from m3runtime.tier import Home, Tier


def contents(home: Home) -> dict[str, Any]:
    """Everything a home tells of what it holds, in values that can be compared."""
    ids = home.ids()
    out = torch.zeros((len(ids), home.slot_bytes), dtype=torch.uint8)
    found = home.read(ids, out)
    return {
        "ids": ids.tolist(),
        "found": found.tolist(),
        "blocks": out.tolist(),
        "references": home.references(ids),
        "embeddings": [(i.tolist(), v.tolist()) for i, v in home.embeddings()],
        "sources": dict(home.sources()),
        "quarantined": dict(home.quarantined()),
        "next_id": home.next_id(),
        "len": len(home),
    }


def check_whole(home: Home, ids: Ids) -> None:
    """Fail unless all of each of these is there, and right."""
    assert check_read(home, ids).all()
    references = [make_reference(id) for id in ids.tolist()]
    assert home.references(ids) == references
    assert home.find([reference.text for reference in references]) == ids.tolist()
    for reference, id in zip(references, ids.tolist(), strict=True):
        assert id in home.ids_of(reference.source)
    batches = list(home.embeddings(ids))
    assert np.concatenate([some for some, _ in batches]).tolist() == ids.tolist()
    assert np.array_equal(np.concatenate([vectors for _, vectors in batches]), make_embeddings(ids))


class HomeContract(TierContract):
    """Subclass it as ``TestMyHome`` and say how to open the home."""

    @abstractmethod
    def open(self, folder: Path, *, read_only: bool = False) -> Home:
        """The home in this folder, slots of `SLOT_BYTES`: made if there is none, unless ``read_only``."""

    @pytest.fixture
    def home(self, tmp_path: Path) -> Iterator[Home]:
        """A new home, closed afterwards."""
        home = self.open(tmp_path / "home")
        yield home
        home.close()

    @pytest.fixture
    def tier(self, home: Home) -> Tier:
        """See `TierContract.tier`. The fixture ``home`` closes it."""
        return home

    def reopen(self, home: Home, folder: Path, *, read_only: bool = False) -> Home:
        """Close and open again."""
        home.close()
        return self.open(folder / "home", read_only=read_only)

    def test_a_new_home_holds_nothing(self, home: Home) -> None:
        assert home.next_id() == 0
        assert home.capacity is None
        assert home.ids().tolist() == []
        assert home.ids().dtype == np.uint64
        assert home.ids_of("anything").tolist() == []
        assert home.sources() == {}
        assert list(home.embeddings()) == []
        assert home.find(["anything", ""]) == [None, None]
        assert home.references(make_ids(0, 1)) == [None, None]
        assert home.quarantined() == {}
        assert home.get_meta("manifest") is None

    def test_holds_all_that_was_committed(self, home: Home) -> None:
        home.commit(make_batch([4, 0, 9]))
        home.commit(make_batch([11, 10]))
        assert home.stored_bytes() > 0
        check_whole(home, make_ids(0, 4, 9, 10, 11))

    def test_survives_closing(self, home: Home, tmp_path: Path) -> None:
        home.commit(make_batch([4, 0, 9]))
        home.commit(make_batch([11, 10]))
        home.quarantine(9, "rotten")
        home.discard(make_ids(11))
        home.set_meta("manifest", b"\0\xff")
        before = contents(home)
        home = self.reopen(home, tmp_path)
        assert contents(home) == before
        assert home.get_meta("manifest") == b"\0\xff"
        check_whole(home, make_ids(0, 4, 10))
        home.close()

    def test_lists_ids_in_order(self, home: Home) -> None:
        home.commit(make_batch([300, 2, 70_000, 1]))
        assert home.ids().tolist() == [1, 2, 300, 70_000]
        assert home.next_id() == 70_001
        source = make_reference(1).source
        assert home.ids_of(source).tolist() == [id for id in (1, 2, 300, 70_000) if id % 3 == 1]
        assert home.sources() == {
            make_reference(0).source: 1,
            make_reference(1).source: 2,
            make_reference(2).source: 1,
        }

    def test_ids_at_both_ends(self, home: Home) -> None:
        home.commit(make_batch([0, LAST_ID]))
        check_whole(home, make_ids(0, LAST_ID))
        assert home.ids().tolist() == [0, LAST_ID]
        assert home.next_id() == 2**64
        with pytest.raises(InputError):
            home.commit(make_batch([5]))

    def test_an_empty_batch(self, home: Home) -> None:
        home.commit(make_batch([]))
        assert len(home) == home.next_id() == 0

    @pytest.mark.parametrize("fault", ["text", "text in batch", "id", "id in batch", "block", "rows", "dim", "slot"])
    def test_a_batch_that_is_refused_leaves_nothing(self, home: Home, fault: str) -> None:
        home.commit(make_batch([1, 2]))
        before = contents(home)
        batch = make_batch([5, 6])
        match fault:
            case "text":
                batch = replace(batch, references=[make_reference(5), make_reference(2)])
            case "text in batch":
                batch = replace(batch, references=[make_reference(5)] * 2)
            case "id":
                batch = make_batch([5, 0])
            case "id in batch":
                batch = make_batch([5, 5])
            case "block":
                batch = replace(batch, blocks=batch.blocks.flip(0))
            case "rows":
                batch = replace(batch, references=batch.references[:1])
            case "dim":
                batch = replace(batch, embeddings=np.zeros((2, DIM + 1), np.float32))
            case "slot":
                batch = replace(batch, blocks=torch.zeros((2, SLOT_BYTES + 1), dtype=torch.uint8))
        with pytest.raises(InputError):
            home.commit(batch)
        assert contents(home) == before
        home.commit(make_batch([5, 6]))

    def test_forgets(self, home: Home) -> None:
        home.commit(make_batch(range(6)))
        gone = make_ids(1, 4, 5, 99)
        home.discard(gone)
        assert home.ids().tolist() == [0, 2, 3]
        assert not check_read(home, gone).any()
        assert home.references(gone) == [None] * 4
        assert home.find([make_reference(1).text]) == [None]
        assert make_reference(1).source not in home.sources()
        assert home.ids_of(make_reference(2).source).tolist() == [2]
        assert list(home.embeddings(gone)) == []
        assert home.next_id() == 6
        check_whole(home, make_ids(0, 2, 3))

    def test_a_forgotten_id_is_never_used_again_but_its_text_is(self, home: Home) -> None:
        home.commit(make_batch([0, 1]))
        home.discard(make_ids(1))
        with pytest.raises(InputError):
            home.commit(make_batch([1]))
        with pytest.raises(InputError):
            write(home, make_ids(1))
        batch = make_batch([2])
        home.commit(replace(batch, references=[make_reference(1)]))
        assert home.find([make_reference(1).text]) == [2]

    def test_quarantine(self, home: Home) -> None:
        home.commit(make_batch([1, 2, 3]))
        home.quarantine(2, "digest does not match")
        home.quarantine(2, "digest does not match")
        home.quarantine(77, "unknown")
        assert home.quarantined() == {2: "digest does not match"}
        assert check_read(home, make_ids(1, 2, 3)).tolist() == [True, False, True]
        assert 2 not in home
        assert len(home) == 2
        assert home.ids().tolist() == [1, 3]
        assert [ids.tolist() for ids, _ in home.embeddings()] == [[1, 3]]
        assert home.references(make_ids(2)) == [make_reference(2)]
        assert 2 in home.ids_of(make_reference(2).source)
        home.discard(make_ids(2))
        assert home.quarantined() == {}
        assert home.references(make_ids(2)) == [None]
        assert len(home) == 2

    def test_embeddings_in_batches(self, home: Home) -> None:
        home.commit(make_batch(range(10)))
        batches = list(home.embeddings(batch=4))
        assert [ids.tolist() for ids, _ in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        for ids, vectors in batches:
            assert vectors.dtype == np.float32
            assert np.array_equal(vectors, make_embeddings(ids))
        some = list(home.embeddings(make_ids(7, 55, 3)))
        assert [ids.tolist() for ids, _ in some] == [[7, 3]]
        assert np.array_equal(some[0][1], make_embeddings(make_ids(7, 3)))

    def test_committing_while_embeddings_are_read(self, home: Home) -> None:
        home.commit(make_batch(range(4)))
        for start, (ids, _) in enumerate(home.embeddings(batch=2)):
            home.commit(make_batch([100 + start]))
            assert len(ids) == 2
        assert len(home) == 6

    def test_meta(self, home: Home) -> None:
        home.set_meta("a", b"1")
        home.set_meta("b", b"")
        home.set_meta("a", b"2" * 100_000)
        assert home.get_meta("a") == b"2" * 100_000
        assert home.get_meta("b") == b""

    def test_reading_only(self, home: Home, tmp_path: Path) -> None:
        home.commit(make_batch([1, 2]))
        before = contents(home)
        home = self.reopen(home, tmp_path, read_only=True)
        assert contents(home) == before
        check_whole(home, make_ids(1, 2))
        uses: tuple[Callable[[], None], ...] = (
            lambda: home.commit(make_batch([3])),
            lambda: write(home, make_ids(4)),
            lambda: home.discard(make_ids(1)),
            lambda: home.quarantine(1, "bad"),
            lambda: home.set_meta("a", b"1"),
        )
        for use in uses:
            with pytest.raises(TierReadOnlyError):
                use()
        assert contents(home) == before
        home.close()

    def test_reading_only_makes_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(BankMissingError):
            self.open(tmp_path / "none", read_only=True)
        assert not (tmp_path / "none").exists()

    def test_refuses_everything_once_closed(self, home: Home) -> None:
        home.close()
        uses: tuple[Callable[[], object], ...] = (
            lambda: home.commit(make_batch([1])),
            home.next_id,
            lambda: home.find(["a"]),
            lambda: home.references(make_ids(1)),
            home.ids,
            lambda: home.ids_of("a"),
            home.sources,
            lambda: list(home.embeddings()),
            lambda: home.quarantine(1, "bad"),
            home.quarantined,
            lambda: home.get_meta("a"),
            lambda: home.set_meta("a", b""),
            home.stored_bytes,
        )
        for use in uses:
            with pytest.raises(TierClosedError):
                use()

    def test_threads_commit_forget_and_read(self, home: Home) -> None:
        taking = threading.Lock()

        def work(number: int) -> None:
            for turn in range(6):
                with taking:  # ids rise from commit to commit
                    first = home.next_id()
                    ids = make_ids(first, first + 1, first + 2)
                    home.commit(make_batch(ids.tolist()))
                check_whole(home, ids)
                check_read(home, home.ids())
                if turn % 2 == number % 2:
                    home.discard(ids[1:2])
                    assert check_read(home, ids).tolist() == [True, False, True]

        together(4, work)
        assert home.next_id() == 4 * 6 * 3
        assert len(home) == 4 * 6 * 3 - 4 * 3
        check_whole(home, home.ids())
