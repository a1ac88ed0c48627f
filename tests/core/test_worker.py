"""Laws of `Worker`: jobs in order, few ahead, and errors that come out where they are waited for."""

import gc
import sys
import threading
import time
from traceback import walk_stack
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.writing.worker import Worker


class MistakeError(Exception):
    """What a job of these tests fails with."""


def working() -> int:
    """Threads of workers that have not ended."""
    gc.disable()  # a collection in `_current_frames` may wait for ever for a lock that the call holds (gh-106883)
    try:
        frames = list(sys._current_frames().values())
    finally:
        gc.enable()
    return sum(any(frame.f_code is Worker._run.__code__ for frame, _ in walk_stack(one)) for one in frames)


def only(before: int) -> bool:
    """Whether there are no more of them than before: the last may only have said that it ends."""
    deadline = time.monotonic() + 60
    while working() > before and time.monotonic() < deadline:
        time.sleep(0.001)
    return working() <= before


@given(jobs=st.integers(0, 20), ahead=st.integers(1, 4))
def test_jobs_are_done_in_order_by_one_other_thread(jobs: int, ahead: int) -> None:
    done: list[tuple[int, int]] = []
    before = working()
    with Worker(ahead=ahead) as worker:
        for number in range(jobs):
            worker.do(lambda number=number: done.append((number, threading.get_ident())))  # type: ignore[misc]
        worker.finish()
        assert [number for number, _ in done] == list(range(jobs))
    assert len({thread for _, thread in done} | {threading.get_ident()}) == 1 + bool(jobs)
    assert only(before)


@given(ahead=st.integers(1, 4))
def test_no_more_are_given_than_may_wait(ahead: int) -> None:
    begin, given_ = threading.Semaphore(0), []
    with Worker(ahead=ahead) as worker:

        def give() -> None:
            for number in range(ahead + 2):
                worker.do(begin.acquire)
                given_.append(number)

        giver = threading.Thread(target=give)
        giver.start()
        for done in range(3):
            while len(given_) < min(ahead + done, ahead + 2):
                pass
            assert len(given_) <= ahead + done
            begin.release()
        begin.release(ahead)
        giver.join()


@given(jobs=st.integers(1, 8), bad=st.integers(0, 7), ahead=st.integers(1, 3), at_the_end=st.booleans())
def test_an_error_comes_out_once_and_nothing_is_done_after_it(
    jobs: int, bad: int, ahead: int, at_the_end: bool
) -> None:
    bad %= jobs
    before = working()
    done: list[int] = []

    def job(number: int) -> None:
        if number == bad:
            raise MistakeError(number)
        done.append(number)

    def work() -> None:
        with Worker(ahead=ahead) as worker:
            for number in range(jobs):
                worker.do(lambda number=number: job(number))  # type: ignore[misc]
            if not at_the_end:
                worker.finish()

    with pytest.raises(MistakeError, match=str(bad)):
        work()
    assert done == list(range(bad))
    assert only(before)


def test_an_error_outside_gives_up_what_waits_and_is_not_hidden() -> None:
    go, done = threading.Event(), list[int]()
    before = working()

    def first() -> None:
        go.wait()
        done.append(0)
        raise MistakeError("never seen")

    def work() -> None:
        with Worker(ahead=5) as worker:
            worker.do(first)
            for number in range(1, 4):
                worker.do(lambda number=number: done.append(number))  # type: ignore[misc]
            threading.Timer(0.05, go.set).start()
            raise KeyError("outside")

    with pytest.raises(KeyError, match="outside"):
        work()
    assert done in ([0], [])  # what had not even begun is given up as well
    assert only(before)


def test_an_interrupt_at_any_moment_ends_it() -> None:
    """Interrupted at each call of a Python or C function in turn, as by Ctrl-C."""

    def run(moment: int) -> int:
        calls = 0

        def watch(_: FrameType, __: str, ___: object) -> None:
            nonlocal calls
            calls += 1
            if calls == moment:
                sys.setprofile(None)
                raise KeyboardInterrupt

        done: list[int] = []
        sys.setprofile(watch)
        try:
            with Worker(ahead=2) as worker:
                for number in range(5):
                    worker.do(lambda number=number: done.append(number))  # type: ignore[misc]
        finally:
            sys.setprofile(None)
            assert done == list(range(len(done)))
        assert len(done) == 5
        return calls

    end = run(0)
    interrupted = 0
    for moment in range(1, end + 1):
        try:
            run(moment)
        except KeyboardInterrupt:
            interrupted += 1
    assert interrupted > end // 2
