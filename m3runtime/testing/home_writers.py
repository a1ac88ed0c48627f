"""The laws of a home that several processes write at once, and of the ids that they reserve."""

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from random import Random

import numpy as np
import pytest

from m3runtime.errors import InputError
from m3runtime.storage.home import Home
from m3runtime.testing.blocks import make_batch, make_blocks, make_ids, make_reference
from m3runtime.testing.home_cold import catalogue
from m3runtime.testing.home_contents import check_whole
from m3runtime.testing.home_laws import HomeLaws
from m3runtime.testing.process import OtherProcess
from m3runtime.testing.threads import together

WRITERS = 3


class WriterLaws(HomeLaws):
    """Every writer sees the others' transactions as if all came one after the other, however long one is stopped."""

    @pytest.fixture
    def writers(self, home: Home) -> Iterator[list[OtherProcess]]:  # noqa: ARG002 - it makes the home
        """Other processes, each with the home open for writing."""
        if not self.several_writers:
            pytest.skip("one process writes this home")
        with ExitStack() as stack:
            started = [stack.enter_context(OtherProcess(type(self))) for _ in range(WRITERS)]
            for writer in started:
                writer.tell("open", str(self.place), read_only=False)
            assert [writer.hear() for writer in started] == [{}] * WRITERS
            yield started

    # Ids

    def test_reserved_ids_are_new_and_follow_each_other(self, home: Home) -> None:
        assert home.reserve(3) == 0
        first = home.reserve(2)
        assert first >= 3
        home.commit(make_batch([0, 1, 2]))
        home.commit(make_batch([first]))
        assert home.next_id() > first
        assert home.reserve(1) >= first + 2
        check_whole(home, make_ids(0, 1, 2, first))

    def test_a_reserved_id_is_used_once(self, home: Home) -> None:
        first = home.reserve(4)
        home.commit(make_batch([first, first + 1]))
        home.discard(make_ids(first + 1))
        for id in (first, first + 1):
            with pytest.raises(InputError):
                home.commit(make_batch([id]))
        home.commit(make_batch([first + 2, first + 3]))
        assert home.ids().tolist() == [first, first + 2, first + 3]

    def test_threads_reserve_other_ids(self, home: Home) -> None:
        reserved = list[int]()

        def work(number: int) -> None:
            for _ in range(5):
                first = home.reserve(number + 1)
                reserved.extend(range(first, first + number + 1))

        together(4, work)
        assert len(set(reserved)) == len(reserved) == 5 * (1 + 2 + 3 + 4)

    def test_an_id_that_another_reserved_is_refused(self, home: Home, writers: list[OtherProcess]) -> None:
        theirs = writers[0].ask("reserve", [2, 3])["reserved"]
        with pytest.raises(InputError):
            home.commit(make_batch([theirs[0]]))
        assert home.reserve(1) >= theirs[1] + 3

    # Races

    def test_writers_reserve_other_ids(self, writers: list[OtherProcess]) -> None:
        for number, writer in enumerate(writers):
            writer.tell("reserve", [1 + (number + turn) % 3 for turn in range(8)])
        taken = list[int]()
        for number, writer in enumerate(writers):
            for turn, first in enumerate(writer.hear()["reserved"]):
                taken += range(first, first + 1 + (number + turn) % 3)
        assert len(set(taken)) == len(taken)

    def test_a_text_that_all_add_is_remembered_once(self, home: Home, writers: list[OtherProcess]) -> None:
        texts = list(range(1000, 1012))
        for number, writer in enumerate(writers):
            writer.tell("race", Random(number).sample(texts, len(texts)))
        won = [writer.hear()["won"] for writer in writers]
        assert sorted(id for one in won for id in one) == texts
        own = {id: own for one in won for id, own in one.items()}
        assert home.find([make_reference(id).text for id in texts]) == [own[id] for id in texts]
        assert home.ids().tolist() == sorted(own.values())
        assert len(home) == len(texts)

    def test_a_cold_reference_that_all_fill_is_filled_once(self, home: Home, writers: list[OtherProcess]) -> None:
        ids = make_ids(*range(12))
        catalogue(home, ids)
        for number, writer in enumerate(writers):
            writer.tell("fill", Random(number).sample(ids.tolist(), len(ids)))
        filled = [writer.hear()["filled"] for writer in writers]
        assert sorted(id for some in filled for id in some) == ids.tolist()
        check_whole(home, ids)
        assert not home.fill(ids, make_blocks(ids, edition=1)).any()

    def test_what_all_commit_is_there(self, home: Home, writers: list[OtherProcess]) -> None:
        for writer in writers:
            writer.tell("write", [5, 3])
        committed = [first for writer in writers for first in [writer.hear()["committed"][0] for _ in range(5)]]
        expected = sorted(id for first in committed for id in range(first, first + 3))
        assert len(set(expected)) == WRITERS * 5 * 3
        assert home.ids().tolist() == expected
        check_whole(home, home.ids())
        for writer in writers:
            assert writer.ask("close") == {}

    # Writers that stop

    def test_a_writer_that_was_stopped_overwrites_nothing(self, home: Home, writers: list[OtherProcess]) -> None:
        """It is stopped at any instant, others commit, and it goes on: all of theirs and all of its own is there."""
        if sys.platform == "win32":
            pytest.skip("processes are not stopped here")
        random, committed = Random(0), list[int]()
        for writer in writers:
            writer.tell("write", [8, 2])
        for turn in range(6):
            time.sleep(random.uniform(0, 0.03))
            writers[turn % WRITERS].stop()
            first = home.reserve(2)
            home.commit(make_batch([first, first + 1]))
            home.discard(make_ids(first))
            committed.append(first + 1)
            writers[turn % WRITERS].go_on()
        for writer in writers:
            for _ in range(8):
                first = writer.hear()["committed"][0]
                committed += [first, first + 1]
        assert home.ids().tolist() == sorted(committed)
        check_whole(home, home.ids())

    def test_a_writer_that_is_killed_holds_up_nobody(self, home: Home, writers: list[OtherProcess]) -> None:
        for writer in writers:
            writer.tell("write", [1000, 2])
        told = list[int]()
        for number, writer in enumerate(writers):
            heard = [writer.hear() for _ in range(1 + number)]
            told += [one["committed"][0] for one in [*heard, *writer.kill()]]
        held = home.ids()
        assert set(told) <= set(held.tolist())
        assert len(held) % 2 == 0
        assert np.array_equal(held[::2] + np.uint64(1), held[1::2])
        check_whole(home, held)
        first = home.reserve(1)
        home.commit(make_batch([first]))
        home.compact()
        check_whole(home, home.ids())
