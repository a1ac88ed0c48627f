"""The laws of a home's transactions."""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from m3runtime.errors import InputError
from m3runtime.storage.home import Home
from m3runtime.testing.blocks import DIM, LAST_ID, SLOT_BYTES, make_batch, make_ids, make_reference
from m3runtime.testing.home_contents import check_whole, contents
from m3runtime.testing.home_laws import HomeLaws
from m3runtime.testing.threads import together
from m3runtime.testing.tier import UNKNOWN, check_read, write


class CommitLaws(HomeLaws):
    """A batch is stored whole or not at all, with what it replaces removed at that instant; no id is used again."""

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
        assert self.raw_read(home, 5) is self.raw_read(home, 6) is None
        home.commit(make_batch([5, 6]))
        check_whole(home, make_ids(1, 2, 5, 6))

    @pytest.mark.parametrize("fault", ["text", "id", "block", "dim"])
    def test_a_refused_batch_replaces_nothing(self, home: Home, fault: str) -> None:
        home.commit(make_batch([1, 2, 3]))
        before = contents(home)
        batch = make_batch([5, 6])
        match fault:
            case "text":  # of one that is not replaced
                batch = replace(batch, references=[make_reference(5), make_reference(2)])
            case "id":
                batch = make_batch([5, 3])
            case "block":
                batch = replace(batch, blocks=batch.blocks.flip(0))
            case "dim":
                batch = replace(batch, embeddings=np.zeros((2, DIM + 1), np.float32))
        with pytest.raises(InputError):
            home.commit(batch, replacing=make_ids(1, 3))
        assert contents(home) == before
        check_whole(home, make_ids(1, 2, 3))

    def test_replaces(self, home: Home) -> None:
        home.commit(make_batch([1, 2, 3, 4]))
        home.quarantine(3, "rotten")
        gone = make_ids(1, 3, 3, UNKNOWN)
        home.commit(make_batch([8, 9]), replacing=gone)
        assert home.ids().tolist() == [2, 4, 8, 9]
        assert home.quarantined() == {}
        assert not check_read(home, gone).any()
        assert home.references(gone) == [None] * 4
        assert self.raw_read(home, 1) is self.raw_read(home, 3) is None
        check_whole(home, make_ids(2, 4, 8, 9))

    def test_a_text_may_move_to_what_replaces_it(self, home: Home) -> None:
        home.commit(make_batch([1, 2]))
        home.commit(
            replace(make_batch([5, 6]), references=[make_reference(2), make_reference(1)]), replacing=make_ids(1, 2)
        )
        assert home.find([make_reference(1).text, make_reference(2).text]) == [6, 5]
        assert home.ids().tolist() == [5, 6]
        assert check_read(home, make_ids(1, 2, 5, 6)).tolist() == [False, False, True, True]

    def test_a_text_stays_known_while_it_is_quarantined(self, home: Home) -> None:
        home.commit(make_batch([1, 2]))
        home.quarantine(2, "rotten")
        with pytest.raises(InputError):
            home.commit(replace(make_batch([5]), references=[make_reference(2)]))
        home.commit(replace(make_batch([5]), references=[make_reference(2)]), replacing=make_ids(2))
        assert home.find([make_reference(2).text]) == [5]
        assert home.quarantined() == {}

    def test_replacing_by_nothing_forgets(self, home: Home) -> None:
        home.commit(make_batch([1, 2]))
        home.commit(make_batch([]), replacing=make_ids(2))
        assert home.ids().tolist() == [1]
        home.commit(make_batch([]), replacing=make_ids())
        assert home.ids().tolist() == [1]
        assert home.next_id() == 3

    def test_thousands_in_a_batch(self, home: Home) -> None:
        ids = make_ids(*range(2000))
        home.commit(make_batch(range(2000)))
        check_whole(home, ids)
        assert np.concatenate([some for some, _ in home.embeddings(batch=333)]).tolist() == ids.tolist()
        home.commit(make_batch(range(2000, 2003)), replacing=ids)
        assert home.ids().tolist() == [2000, 2001, 2002]
        assert len(home) == 3

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

    def test_ids_that_were_passed_over_are_counted(self, home: Home) -> None:
        assert home.unused() == 0
        home.commit(make_batch([0, 1]))
        home.commit(make_batch([5, 9]))
        assert home.unused() == 3 + 3
        home.commit(make_batch([10]), replacing=make_ids(0, 5))
        home.discard(make_ids(9))
        assert home.unused() == 6
        first = home.reserve(4)
        home.commit(make_batch([first + 1, first + 2]))
        assert home.next_id() - home.unused() == 5 + 2

    def test_an_id_that_was_last_is_not_used_again(self, home: Home) -> None:
        home.commit(make_batch([0, 1, 2]))
        home.discard(make_ids(1, 2))
        assert home.next_id() == 3
        home.close()
        with self.open(self.place) as again:
            assert again.next_id() == 3
            with pytest.raises(InputError):
                again.commit(make_batch([2]))

    def test_ids_at_both_ends(self, home: Home) -> None:
        home.commit(make_batch([0, LAST_ID]))
        check_whole(home, make_ids(0, LAST_ID))
        assert home.ids().tolist() == [0, LAST_ID]
        assert home.next_id() == 2**64
        with pytest.raises(InputError):
            home.commit(make_batch([5]))

    def test_committing_while_embeddings_are_read(self, home: Home) -> None:
        home.commit(make_batch(range(4)))
        for start, (ids, _) in enumerate(home.embeddings(batch=2)):
            home.commit(make_batch([100 + start]))
            assert len(ids) == 2
        assert len(home) == 6

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

    def test_a_reader_sees_a_batch_as_a_whole_or_not_at_all(self, home: Home) -> None:
        def work(number: int) -> None:
            for _ in range(15):
                if number == 0:
                    first = home.next_id()
                    old = make_ids(*range(first - 4, first)) if first else make_ids()
                    home.commit(make_batch(range(first, first + 4)), replacing=old)
                else:
                    ids = home.ids().tolist()
                    assert len(ids) in (0, 4)
                    assert not ids or ids == list(range(ids[0], ids[0] + 4))
                    found = check_read(home, make_ids(*range(16, 24)))
                    assert found.tolist() in ([False] * 8, [True] * 4 + [False] * 4, [False] * 4 + [True] * 4)

        together(3, work)
