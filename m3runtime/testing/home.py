"""`HomeContract`: the laws of a home."""

import numpy as np
import pytest
import torch

from m3runtime.errors import InputError
from m3runtime.storage.home import Home
from m3runtime.testing.blocks import (
    SLOT_BYTES,
    make_batch,
    make_blocks,
    make_embeddings,
    make_ids,
    make_reference,
    same_block,
)
from m3runtime.testing.home_cold import ColdLaws
from m3runtime.testing.home_commits import CommitLaws
from m3runtime.testing.home_contents import check_whole, contents
from m3runtime.testing.home_durability import DurabilityLaws
from m3runtime.testing.home_erasure import ErasureLaws
from m3runtime.testing.home_expiry import ExpiryLaws
from m3runtime.testing.home_places import PlaceLaws
from m3runtime.testing.home_writers import WriterLaws
from m3runtime.testing.tier import check_read

__all__ = ["HomeContract", "check_whole", "contents"]


class HomeContract(CommitLaws, PlaceLaws, ExpiryLaws, ColdLaws, DurabilityLaws, ErasureLaws, WriterLaws):
    """The laws of `Home`. Subclass it as ``TestMyHome``, open the home and its back door: see `TierContract`.

    Its themes: the content of a home (here), transactions (`CommitLaws`), places and the states of their
    sources (`PlaceLaws`), expiry (`ExpiryLaws`), references without a block (`ColdLaws`), durability and other
    processes (`DurabilityLaws`), compaction (`ErasureLaws`), and several writers at once (`WriterLaws`).
    """

    def test_a_new_home_holds_nothing(self, home: Home) -> None:
        assert home.next_id() == 0
        assert home.capacity is None
        assert home.ids().tolist() == []
        assert home.ids().dtype == np.uint64
        assert home.ids_of("anything").tolist() == []
        assert home.sources() == {}
        assert home.states() == {}
        assert home.expiring() == {}
        assert list(home.embeddings()) == []
        assert home.find(["anything", ""]) == [None, None]
        assert home.references(make_ids(0, 1)) == [None, None]
        assert home.quarantined() == {}
        assert home.get_meta("manifest") is None

    def test_wider_slots_hold_longer_blocks(self, home: Home) -> None:
        home.commit(make_batch([4, 0, 9]))
        home.widen(2 * SLOT_BYTES)
        assert home.slot_bytes == 2 * SLOT_BYTES
        home.commit(make_batch([11, 10], 2 * SLOT_BYTES))
        ids = make_ids(0, 4, 9, 10, 11)
        rows = torch.zeros((len(ids), 2 * SLOT_BYTES), dtype=torch.uint8)
        assert home.read(ids, rows).all()
        made = [*make_blocks(ids[:3]), *make_blocks(ids[3:], 2 * SLOT_BYTES)]
        assert all(map(same_block, rows, made))
        for fewer in (SLOT_BYTES, 0):
            with pytest.raises(InputError):
                home.widen(fewer)
        assert home.slot_bytes == 2 * SLOT_BYTES

    def test_holds_all_that_was_committed(self, home: Home) -> None:
        home.commit(make_batch([4, 0, 9]))
        home.commit(make_batch([11, 10]))
        assert home.stored_bytes() > 0
        check_whole(home, make_ids(0, 4, 9, 10, 11))

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

    def test_an_id_twice_in_what_is_asked_for(self, home: Home) -> None:
        home.commit(make_batch(range(4)))
        twice = make_ids(2, 0, 2)
        assert home.references(twice) == [make_reference(id) for id in (2, 0, 2)]
        assert home.find([make_reference(id).text for id in (2, 0, 2)]) == [2, 0, 2]
        [(ids, vectors)] = home.embeddings(twice)
        assert ids.tolist() == [2, 0, 2]
        assert np.array_equal(vectors, make_embeddings(twice))
        home.discard(twice)
        assert home.ids().tolist() == [1, 3]

    def test_nothing_asked_for(self, home: Home) -> None:
        home.commit(make_batch(range(4)))
        assert home.references(make_ids()) == []
        assert home.find([]) == []
        assert list(home.embeddings(make_ids())) == []
        home.discard(make_ids())
        assert len(home) == 4

    def test_meta(self, home: Home) -> None:
        home.set_meta("a", b"1")
        home.set_meta("b", b"")
        home.set_meta("a", b"2" * 100_000)
        assert home.get_meta("a") == b"2" * 100_000
        assert home.get_meta("b") == b""
