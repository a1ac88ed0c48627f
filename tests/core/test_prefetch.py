import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from functools import partial

import pytest
from m3runtime.recall.prefetch import Prefetcher, PrefetchStats

from m3runtime.errors import TierClosedError, TierError


@pytest.fixture
def prefetcher() -> Iterator[Prefetcher]:
    prefetcher = Prefetcher(waiting=3)
    yield prefetcher
    prefetcher.close()


class Gate:
    """Holds the worker up, so that hints wait."""

    def __init__(self, prefetcher: Prefetcher) -> None:
        self.entered, self.opened = threading.Event(), threading.Event()
        self.future = prefetcher.hint("gate", self.pass_through)
        self.entered.wait()

    def pass_through(self) -> None:
        self.entered.set()
        self.opened.wait()


def test_runs_hints_in_order(prefetcher: Prefetcher) -> None:
    gate, done = Gate(prefetcher), list[str]()
    for key in "abc":
        prefetcher.hint(key, partial(done.append, key))
    gate.opened.set()
    assert prefetcher.drain()
    assert done == ["a", "b", "c"]
    assert prefetcher.stats() == PrefetchStats(done=4)


def test_a_future_has_the_result(prefetcher: Prefetcher) -> None:
    assert prefetcher.hint("a", lambda: 7).result(timeout=60) == 7


def test_a_newer_hint_takes_the_place_of_one_that_waits(prefetcher: Prefetcher) -> None:
    gate, done = Gate(prefetcher), list[int]()
    old = prefetcher.hint("a", lambda: done.append(1))
    prefetcher.hint("b", lambda: done.append(2))
    prefetcher.hint("a", lambda: done.append(3))
    gate.opened.set()
    prefetcher.drain()
    assert done == [2, 3]
    with pytest.raises(CancelledError):
        old.result(timeout=60)
    assert prefetcher.stats() == PrefetchStats(done=3, replaced=1)


def test_too_many_hints_push_out_the_oldest(prefetcher: Prefetcher) -> None:
    gate, done = Gate(prefetcher), list[int]()
    futures = [prefetcher.hint(key, partial(done.append, key)) for key in range(5)]
    gate.opened.set()
    prefetcher.drain()
    assert done == [2, 3, 4]
    assert [future.cancelled() for future in futures] == [True, True, False, False, False]


def test_a_stream_that_ends_is_forgotten(prefetcher: Prefetcher) -> None:
    gate = Gate(prefetcher)
    future = prefetcher.hint("a", lambda: None)
    prefetcher.forget("a")
    prefetcher.forget("a")
    gate.opened.set()
    assert prefetcher.drain()
    assert future.cancelled()


def fail_typed() -> None:
    raise TierError("tier lmdb: input/output error")


def fail() -> None:
    raise ZeroDivisionError("a mistake")


def test_a_typed_error_is_counted_and_does_not_stop_it(prefetcher: Prefetcher) -> None:
    future = prefetcher.hint("a", fail_typed)
    assert isinstance(future.exception(timeout=60), TierError)
    prefetcher.hint("b", lambda: None)
    prefetcher.drain()
    assert prefetcher.stats() == PrefetchStats(done=1, failed=1, last_error="tier lmdb: input/output error")


@pytest.mark.parametrize(
    "use",
    [lambda p: p.hint("b", lambda: None), Prefetcher.drain, Prefetcher.close],
    ids=["hint", "drain", "close"],
)
def test_a_mistake_is_raised_by_the_next_call(use: Callable[[Prefetcher], object]) -> None:
    prefetcher = Prefetcher()
    prefetcher.hint("a", fail).exception(timeout=60)
    with pytest.raises(ZeroDivisionError, match="a mistake"):
        use(prefetcher)
    assert prefetcher.drain()  # raised once
    prefetcher.close()


def test_draining_gives_up_after_a_while(prefetcher: Prefetcher) -> None:
    gate = Gate(prefetcher)
    assert not prefetcher.drain(timeout=0.01)
    gate.opened.set()
    assert prefetcher.drain()


def test_closing_waits_for_what_runs_and_pushes_out_what_waits() -> None:
    prefetcher = Prefetcher()
    gate = Gate(prefetcher)
    waiting = prefetcher.hint("a", lambda: None)
    closing = threading.Thread(target=prefetcher.close)
    closing.start()
    while not waiting.cancelled():
        pass
    assert not gate.future.done()
    gate.opened.set()
    closing.join()
    assert gate.future.done()
    prefetcher.close()
    with pytest.raises(TierClosedError):
        prefetcher.hint("a", lambda: None)


def test_urgent_work_goes_first(prefetcher: Prefetcher) -> None:
    gate, done = Gate(prefetcher), list[str]()
    for key in "ab":
        prefetcher.hint(key, partial(done.append, key))
    for key in "cd":
        prefetcher.hint(key, partial(done.append, key), urgent=True)
    gate.opened.set()
    prefetcher.drain()
    assert done == ["c", "d", "a", "b"]


def test_urgent_and_other_work_push_out_the_oldest_of_their_own(prefetcher: Prefetcher) -> None:
    gate, done = Gate(prefetcher), list[int]()
    for key in range(5):
        prefetcher.hint(key, partial(done.append, key), urgent=key < 4)
    gate.opened.set()
    prefetcher.drain()
    assert done == [1, 2, 3, 4]


def test_threads_work_beside_each_other_and_none_is_left() -> None:
    prepared = list[str]()
    prefetcher = Prefetcher(threads=3, prepare=lambda: prepared.append(threading.current_thread().name))
    met = threading.Barrier(3)
    futures = [prefetcher.hint(key, met.wait) for key in range(3)]
    assert sorted(future.result(timeout=60) for future in futures) == [0, 1, 2]
    prefetcher.close()
    assert len(set(prepared)) == 3
    assert not {thread.name for thread in threading.enumerate() if thread.is_alive()}.intersection(prepared)


def test_work_may_hint_at_more(prefetcher: Prefetcher) -> None:
    done = list[str]()
    prefetcher.hint("a", lambda: prefetcher.hint("b", lambda: done.append("b")))
    assert prefetcher.drain()
    assert done == ["b"]
    assert prefetcher.stats() == PrefetchStats(done=2)
