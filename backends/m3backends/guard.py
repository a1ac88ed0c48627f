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

    An interrupt (Ctrl-C) may come at any call. So a thread leaves in lines that call nothing, and whoever waits looks
    again every so often: an interrupt may have come before the notice. One may also come after a thread has entered and
    before its ``with`` block knows of it. Then the thread is inside until the interrupt's traceback is gone, and may
    have to enter again to clean up; so what a thread would wait for of its own is forgotten.
    """

    def __init__(self, closed: str) -> None:
        self._lock = threading.Lock()  # entered as itself: an interrupt can come between a `Condition` and its lock
        self._condition = threading.Condition(self._lock)
        # Each entry by an object of its own, with the thread that made it.
        self._inside: dict[object, int] = {}
        self._alone: dict[object, int] = {}  # those that wait to be alone, or are, in the order in which they came
        self._message = closed
        self._closed = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Enter with others. Raises `TierClosedError` after `alone` with ``closing``."""
        me, thread = object(), threading.get_ident()
        try:
            with self._lock:
                self._forget(self._alone, thread)
                while self._alone:
                    self._condition.wait(_PATIENCE)
                if self._closed:
                    raise TierClosedError(self._message)
                self._inside[me] = thread
            yield
        finally:
            if me in self._inside:
                del self._inside[me]
            with self._lock:
                self._condition.notify_all()

    @contextmanager
    def alone(self, *, closing: bool = False) -> Iterator[None]:
        """Wait until no other thread is inside. Raises `TierClosedError`, but not if closing again."""
        me, thread = object(), threading.get_ident()
        try:
            with self._lock:
                self._forget(self._inside, thread)
                self._forget(self._alone, thread)
                self._alone[me] = thread
                while self._inside or [*self._alone].index(me):
                    self._condition.wait(_PATIENCE)
                if self._closed and not closing:
                    raise TierClosedError(self._message)
                self._closed |= closing
                self._inside[me] = thread
            yield
        finally:
            if me in self._inside:
                del self._inside[me]
            if me in self._alone:
                del self._alone[me]
            with self._lock:
                self._condition.notify_all()

    def _forget(self, entries: dict[object, int], thread: int) -> None:
        """Forget the entries that an interrupt has left of this thread."""
        for entry, other in list(entries.items()):  # a list, for others leave meanwhile
            if other == thread:
                entries.pop(entry, None)
                self._inside.pop(entry, None)
