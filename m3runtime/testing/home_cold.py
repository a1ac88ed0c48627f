"""The laws of a home's catalogue: references without a block, and how each gets its own, once."""

import threading
from dataclasses import replace

import numpy as np
import pytest

from m3runtime.errors import InputError
from m3runtime.memory.block import Ids
from m3runtime.storage.home import Home
from m3runtime.testing.blocks import DIM, make_batch, make_blocks, make_embeddings, make_ids, make_reference
from m3runtime.testing.home_contents import check_whole, contents
from m3runtime.testing.home_laws import HomeLaws
from m3runtime.testing.threads import together
from m3runtime.testing.tier import UNKNOWN, check_read, write


def catalogue(home: Home, ids: Ids) -> None:
    """Catalogue these ids as cold references."""
    home.catalogue(ids, [make_reference(id) for id in ids.tolist()], make_embeddings(ids))


class ColdLaws(HomeLaws):
    """A cold reference is remembered like any other without a block; it gets a block once, and never another."""

    def test_what_is_catalogued_is_remembered_without_a_block(self, home: Home) -> None:
        assert home.cold().tolist() == []
        assert home.cold().dtype == np.uint64
        catalogue(home, make_ids(4, 0, 9))
        ids = make_ids(0, 4, 9)
        assert home.ids().tolist() == home.cold().tolist() == [0, 4, 9]
        assert len(home) == 0
        assert not home.contains(ids).any()
        assert not check_read(home, ids).any()
        assert home.references(ids) == [make_reference(id) for id in (0, 4, 9)]
        assert home.find([make_reference(4).text]) == [4]
        assert home.ids_of(make_reference(9).source).tolist() == [0, 9]
        assert sum(home.sources().values()) == 3
        [(found, vectors)] = home.embeddings()
        assert found.tolist() == [0, 4, 9]
        assert np.array_equal(vectors, make_embeddings(ids))
        assert home.next_id() == 10
        assert self.raw_read(home, 4) is None

    def test_which_of_these_are_cold(self, home: Home) -> None:
        home.commit(make_batch([1, 2]))
        catalogue(home, make_ids(3, 5))
        assert home.cold(make_ids(5, 1, UNKNOWN, 3, 5)).tolist() == [3, 5]
        assert home.cold(make_ids()).tolist() == []
        assert home.cold(make_ids(1)).tolist() == []
        assert len(home) == 2

    def test_is_filled_once(self, home: Home) -> None:
        catalogue(home, make_ids(1, 2, 3))
        assert home.fill(make_ids(3, 1), make_blocks(make_ids(3, 1))).tolist() == [True, True]
        assert home.cold().tolist() == [2]
        check_whole(home, make_ids(1, 3))
        again = make_ids(1, 2, 3)
        assert home.fill(again, make_blocks(again, edition=1)).tolist() == [False, True, False]
        check_whole(home, make_ids(1, 3))
        assert home.cold().tolist() == []
        assert home.ids().tolist() == [1, 2, 3]
        assert len(home) == 3

    def test_an_id_twice_gets_its_first_block(self, home: Home) -> None:
        catalogue(home, make_ids(1))
        twice = make_ids(1, 1)
        blocks = make_blocks(twice)
        blocks[1] = make_blocks(make_ids(1), edition=1)[0]
        assert home.fill(twice, blocks).tolist() == [True, False]
        check_whole(home, make_ids(1))

    def test_only_what_is_cold_is_filled(self, home: Home) -> None:
        home.commit(make_batch([1]))
        write(home, make_ids(2))
        catalogue(home, make_ids(3, 4, 5))
        home.discard(make_ids(3))
        home.quarantine(4, "its embedding is damaged")
        ids = make_ids(1, 2, 3, 4, UNKNOWN)
        before = contents(home)
        assert not home.fill(ids, make_blocks(ids, edition=1)).any()
        assert contents(home) == before
        assert check_read(home, ids).tolist() == [True, True, False, False, False]
        assert self.raw_read(home, 3) is self.raw_read(home, 4) is None
        assert home.fill(make_ids(), make_blocks(make_ids())).tolist() == []

    def test_a_cold_reference_can_be_set_apart_and_forgotten(self, home: Home) -> None:
        home.commit(make_batch([0]))
        catalogue(home, make_ids(1, 2, 3))
        home.quarantine(2, "damaged")
        assert home.quarantined() == {2: "damaged"}
        assert home.ids().tolist() == [0, 1, 3]
        assert home.cold().tolist() == [1, 3]
        assert len(home) == 1
        home.discard(make_ids(2, 3))
        assert home.quarantined() == {}
        assert home.cold().tolist() == [1]
        assert home.references(make_ids(2, 3)) == [None, None]
        assert home.find([make_reference(3).text]) == [None]
        assert home.next_id() == 4

    def test_what_replaces_a_cold_reference_has_a_block(self, home: Home) -> None:
        catalogue(home, make_ids(1, 2))
        home.commit(make_batch([7]), replacing=make_ids(1))
        assert home.cold().tolist() == [2]
        assert home.references(make_ids(1)) == [None]
        check_whole(home, make_ids(7))

    @pytest.mark.parametrize("fault", ["text", "text in batch", "id", "id in batch", "rows", "dim", "infinite"])
    def test_what_is_refused_leaves_nothing(self, home: Home, fault: str) -> None:
        home.commit(make_batch([1]))
        catalogue(home, make_ids(2))
        before = contents(home)
        ids = make_ids(5, 6)
        references, vectors = [make_reference(5), make_reference(6)], make_embeddings(ids)
        match fault:
            case "text":  # of one that is cold itself
                references[1] = make_reference(2)
            case "text in batch":
                references[1] = references[0]
            case "id":
                ids = make_ids(5, 2)
            case "id in batch":
                ids = make_ids(5, 5)
            case "rows":
                references.pop()
            case "dim":
                vectors = np.zeros((2, DIM + 1), np.float32)
            case "infinite":
                vectors[1, 0] = np.inf
        with pytest.raises(InputError):
            home.catalogue(ids, references, vectors)
        assert contents(home) == before
        catalogue(home, make_ids(5, 6))
        assert home.cold().tolist() == [2, 5, 6]

    def test_a_cold_text_and_id_are_taken(self, home: Home) -> None:
        catalogue(home, make_ids(1))
        for batch in (replace(make_batch([2]), references=[make_reference(1)]), make_batch([1])):
            with pytest.raises(InputError):
                home.commit(batch)
        with pytest.raises(InputError):
            write(home, make_ids(1))
        assert home.cold().tolist() == [1]

    @pytest.mark.parametrize("fault", ["block", "width", "count"])
    def test_blocks_that_do_not_fit_fill_nothing(self, home: Home, fault: str) -> None:
        ids = make_ids(1, 2)
        catalogue(home, ids)
        blocks = make_blocks(ids)
        match fault:
            case "block":  # of the last one
                blocks[1] = blocks[0]
            case "width":
                blocks = blocks.repeat(1, 2)
            case "count":
                blocks = blocks[:1]
        with pytest.raises(InputError):
            home.fill(ids, blocks)
        assert home.cold().tolist() == [1, 2]
        assert self.raw_read(home, 1) is self.raw_read(home, 2) is None

    def test_threads_that_fill_the_same_ids_fill_each_once(self, home: Home) -> None:
        ids = make_ids(*range(40))
        catalogue(home, ids)
        filled = np.zeros(40, np.int64)
        counting = threading.Lock()

        def work(number: int) -> None:
            for start in range(0, 40, 8):
                some = np.roll(ids, number * 5)[start : start + 8]
                got = home.fill(some, make_blocks(some))
                with counting:
                    filled[some[got].astype(np.int64)] += 1
                assert check_read(home, some).all()

        together(4, work)
        assert filled.tolist() == [1] * 40
        assert home.cold().tolist() == []
        check_whole(home, ids)

    def test_a_reader_sees_all_that_a_call_filled_or_nothing(self, home: Home) -> None:
        ids = make_ids(*range(60))
        catalogue(home, ids)

        def work(number: int) -> None:
            for start in range(0, 60, 4):
                some = ids[start : start + 4]
                if number == 0:
                    assert home.fill(some, make_blocks(some)).all()
                else:
                    assert check_read(home, some).tolist() in ([False] * 4, [True] * 4)
                    assert home.ids().tolist() == ids.tolist()

        together(3, work)
        check_whole(home, ids)
