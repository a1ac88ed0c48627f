"""`Guard`: a lock that many threads share, or one has alone."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from m3runtime.errors import TierClosedError


class Guard:
    """A shared or exclusive lock. A thread that waits for `alone` keeps new ones out.

    It is not reentrant: a thread inside that enters again would wait for an `alone` that waits for it.
    """

    def __init__(self, closed: str) -> None:
        self._condition = threading.Condition()
        self._sharing = 0
        self._alone = 0
        self._message = closed
        self._closed = False

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Enter with others. Raises `TierClosedError` after `alone` with ``closing``."""
        with self._condition:
            self._condition.wait_for(lambda: not self._alone)
            if self._closed:
                raise TierClosedError(self._message)
            self._sharing += 1
        try:
            yield
        finally:
            with self._condition:
                self._sharing -= 1
                self._condition.notify_all()

    @contextmanager
    def alone(self, *, closing: bool = False) -> Iterator[None]:
        """Wait until no other thread is inside. Raises `TierClosedError`, but not if closing again."""
        with self._condition:
            self._alone += 1
            try:
                self._condition.wait_for(lambda: not self._sharing)
                if self._closed and not closing:
                    raise TierClosedError(self._message)
                self._closed |= closing
                yield
            finally:
                self._alone -= 1
                self._condition.notify_all()
