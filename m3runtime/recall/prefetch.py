"""`Prefetcher`: does in the background, ahead of need, what a stream hints at."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from m3runtime.errors import M3Error, TierClosedError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PrefetchStats:
    """What became of the hints so far; what waits or runs is in none of these."""

    done: int = 0
    replaced: int = 0
    """Hints that a newer one of the same key, or too many others, pushed out before they began."""
    failed: int = 0
    """Hints that ended in an `M3Error`."""
    last_error: str = ""


class Prefetcher:
    """Runs hints on daemon threads of its own: urgent ones first, oldest first.

    A hint is a callable, such as "embed this text, search, lift what was found". The newest of a key takes
    the place of the one that waits, so a slow drive is never asked for what a stream has left behind. At
    most ``waiting`` hints wait, and as many urgent ones; the oldest is dropped for one more.

    An `M3Error` of a hint is counted, and raised by its future. Any other exception is a mistake in the
    program, and is also raised by the next call of `hint`, `drain` or `close`. Thread-safe.
    """

    def __init__(self, waiting: int = 64, threads: int = 1, prepare: Callable[[], object] | None = None) -> None:
        """``prepare`` is called by each thread when it starts."""
        self._most = max(1, waiting)
        self._urgent, self._later = _Queue(), _Queue()
        self._change = threading.Condition()
        self._prepare = prepare
        self._running = 0
        self._closing = False
        self._mistake: BaseException | None = None
        self._done = self._replaced = self._failed = 0
        self._last_error = ""
        self._threads = [
            threading.Thread(target=self._work, name=f"m3-prefetch-{number}", daemon=True) for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def hint(self, key: Hashable, work: Callable[[], T], *, urgent: bool = False) -> "Future[T]":
        """Queue ``work`` for the stream ``key``. Its future is cancelled if it is pushed out.

        ``urgent`` is for what somebody waits for. Raises `TierClosedError` after `close`.
        """
        future: Future[T] = Future()
        with self._change:
            self._raise_mistake()
            if self._closing:
                raise TierClosedError("the prefetcher is closed")
            pushed_out = self._push_out(key)
            queue = self._urgent if urgent else self._later
            if len(queue) >= self._most:
                pushed_out += self._push_out(next(iter(queue)))
            queue[key] = work, future
            self._change.notify_all()
        _cancel(pushed_out)
        return future

    def forget(self, key: Hashable) -> None:
        """Push out what waits for ``key``: its stream has ended."""
        with self._change:
            pushed_out = self._push_out(key)
        _cancel(pushed_out)

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until nothing waits or runs. False if that took longer than ``timeout`` seconds."""
        with self._change:
            idle = self._change.wait_for(lambda: not (self._urgent or self._later or self._running), timeout)
            self._raise_mistake()
            return idle

    def stats(self) -> PrefetchStats:
        """A snapshot."""
        with self._change:
            return PrefetchStats(self._done, self._replaced, self._failed, self._last_error)

    def close(self) -> None:
        """Push out what waits, and wait for what runs: no thread is left. Closing twice is fine."""
        with self._change:
            self._closing = True
            pushed_out = [one for key in (*self._urgent, *self._later) for one in self._push_out(key)]
            self._change.notify_all()
        _cancel(pushed_out)
        for thread in self._threads:
            thread.join()
        with self._change:
            self._raise_mistake()

    def _push_out(self, key: Hashable) -> "list[Future[Any]]":
        """The futures to be cancelled, once the lock is given back: who waits for them may have locks of its own."""
        found = [queue.pop(key)[1] for queue in (self._urgent, self._later) if key in queue]
        self._replaced += len(found)
        return found

    def _raise_mistake(self) -> None:
        if self._mistake is not None:
            mistake, self._mistake = self._mistake, None
            raise mistake

    def _work(self) -> None:
        if self._prepare is not None:
            self._prepare()
        while True:
            with self._change:
                self._change.wait_for(lambda: self._urgent or self._later or self._closing)
                if not (self._urgent or self._later):
                    return
                _, (work, future) = (self._urgent or self._later).popitem(last=False)
                self._running += 1
            if future.set_running_or_notify_cancel():
                self._run(work, future)
            del work, future  # they may hold much, and the next hint may come late
            with self._change:
                self._running -= 1
                self._change.notify_all()

    def _run(self, work: Callable[[], Any], future: "Future[Any]") -> None:
        try:
            result = work()
        except BaseException as error:  # noqa: BLE001 - it goes on to whoever asks next, none is lost
            with self._change:
                if isinstance(error, M3Error):
                    self._failed += 1
                    self._last_error = str(error)
                else:
                    self._mistake = error
            future.set_exception(error)
        else:
            with self._change:
                self._done += 1
            future.set_result(result)


_Queue = OrderedDict[Hashable, tuple[Callable[[], Any], "Future[Any]"]]


def _cancel(futures: "list[Future[Any]]") -> None:
    for future in futures:
        future.cancel()
