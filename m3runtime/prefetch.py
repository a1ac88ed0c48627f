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
    """Runs hints one after the other on a daemon thread of its own, oldest first.

    A hint is a callable, such as "embed this text, search, lift what was found". The newest of a key takes
    the place of the one that waits, so a slow drive is never asked for what a stream has left behind. At
    most ``waiting`` hints wait; the oldest is dropped for one more.

    An `M3Error` of a hint is counted, and raised by its future. Any other exception is a mistake in the
    program, and is also raised by the next call of `hint`, `drain` or `close`. Thread-safe.
    """

    def __init__(self, waiting: int = 64) -> None:
        self._most = max(1, waiting)
        self._hints: OrderedDict[Hashable, tuple[Callable[[], Any], Future[Any]]] = OrderedDict()
        self._change = threading.Condition()
        self._running = False
        self._closing = False
        self._mistake: BaseException | None = None
        self._done = self._replaced = self._failed = 0
        self._last_error = ""
        self._thread = threading.Thread(target=self._work, name="m3-prefetch", daemon=True)
        self._thread.start()

    def hint(self, key: Hashable, work: Callable[[], T]) -> "Future[T]":
        """Queue ``work`` for the stream ``key``. Its future is cancelled if it is pushed out.

        Raises `TierClosedError` after `close`.
        """
        future: Future[T] = Future()
        with self._change:
            self._raise_mistake()
            if self._closing:
                raise TierClosedError("the prefetcher is closed")
            self._push_out(key)
            if len(self._hints) >= self._most:
                self._push_out(next(iter(self._hints)))
            self._hints[key] = work, future
            self._change.notify_all()
        return future

    def forget(self, key: Hashable) -> None:
        """Push out what waits for ``key``: its stream has ended."""
        with self._change:
            self._push_out(key)

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until nothing waits or runs. False if that took longer than ``timeout`` seconds."""
        with self._change:
            idle = self._change.wait_for(lambda: not self._hints and not self._running, timeout)
            self._raise_mistake()
            return idle

    def stats(self) -> PrefetchStats:
        """A snapshot."""
        with self._change:
            return PrefetchStats(self._done, self._replaced, self._failed, self._last_error)

    def close(self) -> None:
        """Push out what waits, and wait for what runs. Closing twice is fine."""
        with self._change:
            self._closing = True
            for key in list(self._hints):
                self._push_out(key)
            self._change.notify_all()
        self._thread.join()
        with self._change:
            self._raise_mistake()

    def _push_out(self, key: Hashable) -> None:
        if key in self._hints:
            self._hints.pop(key)[1].cancel()
            self._replaced += 1

    def _raise_mistake(self) -> None:
        if self._mistake is not None:
            mistake, self._mistake = self._mistake, None
            raise mistake

    def _work(self) -> None:
        while True:
            with self._change:
                self._running = False
                self._change.notify_all()
                self._change.wait_for(lambda: self._hints or self._closing)
                if not self._hints:
                    return
                _, (work, future) = self._hints.popitem(last=False)
                self._running = True
            if future.set_running_or_notify_cancel():
                self._run(work, future)

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
