"""`Breaker`: a circuit breaker. What fails is left alone for a while, so that nobody waits for its time-outs."""

import threading
import time
from collections.abc import Callable

FIRST, MOST = 0.5, 30.0
"""Seconds that something is left alone: after its first failure, and after many. Each failure doubles them."""


class Breaker:
    """Says whether something may be asked. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._pause = 0.0
        self._until = 0.0

    def lets(self) -> bool:
        """May one ask now? After a pause one caller may, and the others wait for what becomes of it."""
        with self._lock:
            if not self._pause:
                return True
            if self._clock() < self._until:
                return False
            self._until = self._clock() + self._pause
            return True

    def failed(self) -> None:
        """Note a failure."""
        with self._lock:
            self._pause = min(MOST, 2 * self._pause or FIRST)
            self._until = self._clock() + self._pause

    def succeeded(self) -> None:
        """Note an answer: everybody may ask."""
        with self._lock:
            self._pause = 0.0
