"""`Background`: threads for work that nobody must wait for. An error stays with the work that met it."""

import logging
import threading
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor, wait

from m3runtime.device.threads import release
from m3runtime.errors import M3Error, TierClosedError

log = logging.getLogger("m3runtime")


class Background:
    """Two pools of threads: one prefetches, the other one loads what recalls wait for until their deadline.

    Errors are counted, and no stream's call sees them, but for a recall that waits for a part whose load failed. An
    error that is no `M3Error` is a mistake in a program and is logged with its traceback. Thread-safe.
    """

    def __init__(self, threads: int, prepare: Callable[[], object]) -> None:
        """Each pool has ``threads`` threads, which call ``prepare`` first."""
        self._ahead = ThreadPoolExecutor(threads, "m3-ahead", prepare)
        self._urgent = ThreadPoolExecutor(threads, "m3-urgent", prepare)
        self._lock = threading.Lock()
        self._running: set[Future[None]] = set()
        self._failed = 0
        self._last_error = ""

    def submit(self, work: Callable[[], None], *, urgent: bool = False) -> "Future[None]":
        """Do the work in the background.

        Raises `TierClosedError` after `close`, and `concurrent.futures.BrokenExecutor` if ``prepare`` raised.
        """
        pool = self._urgent if urgent else self._ahead
        with self._lock:
            try:
                future = pool.submit(self._run, work)
            except BrokenExecutor:
                raise
            except RuntimeError:  # how a pool says that it was shut down
                raise TierClosedError("the runtime is closed") from None
            self._running = {future, *(one for one in self._running if not one.done())}
        return future

    def failures(self) -> tuple[int, str]:
        """How much work has failed so far, and the last error."""
        with self._lock:
            return self._failed, self._last_error

    def drain(self, timeout: float | None = None) -> bool:
        """Wait until no work is left, for ``timeout`` seconds at most. Returns whether none is."""
        while True:
            with self._lock:
                running = [one for one in self._running if not one.done()]
            if not running:
                return True
            if wait(running, timeout).not_done:
                return False

    def close(self) -> None:
        """Cancel what has not begun and wait for the rest: no thread is left. Closing twice is fine."""
        for pool in (self._ahead, self._urgent):
            pool.shutdown(cancel_futures=True)

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            if not isinstance(error, M3Error):
                log.exception("an error in the background")
            with self._lock:
                self._failed += 1
                self._last_error = str(error) or type(error).__name__
            raise
        finally:
            release()
