"""`Guard`: a lock that many threads share, or one has alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from m3runtime.errors import TierClosedError

_PATIENCE = 0.1
"""Seconds until a thread that waits looks again."""


class Guard:
    """A shared or exclusive lock. A thread that waits for `alone` keeps new ones out.

    It is not reentrant: a thread inside that enters again would wait for an `alone` that waits for it.

    An interrupt (Ctrl-C) may come at any call. So a thread leaves in a line that calls nothing, and whoever waits looks
    again every so often: an interrupt may have come before the notice.
    """

    def __init__(self, closed: str) -> None:
        self._lock = threading.Lock()  # entered as itself: an interrupt can come between a `Condition` and its lock
        self._condition = threading.Condition(self._lock)
        self._inside: dict[object, None] = {}
        self._alone = 0
        self._message = closed
        self._closed = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Enter with others. Raises `TierClosedError` after `alone` with ``closing``."""
        me = object()
        try:
            with self._lock:
                while self._alone:
                    self._condition.wait(_PATIENCE)
                if self._closed:
                    raise TierClosedError(self._message)
                self._inside[me] = None
            yield
        finally:
            if me in self._inside:
                del self._inside[me]
            with self._lock:
                self._condition.notify_all()

    @contextmanager
    def alone(self, *, closing: bool = False) -> Iterator[None]:
        """Wait until no other thread is inside. Raises `TierClosedError`, but not if closing again."""
        with self._lock:
            self._alone += 1
            try:
                while self._inside:
                    self._condition.wait(_PATIENCE)
                if self._closed and not closing:
                    raise TierClosedError(self._message)
                self._closed |= closing
                yield
            finally:
                self._alone -= 1
                self._condition.notify_all()
