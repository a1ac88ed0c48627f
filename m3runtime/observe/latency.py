"""`Latency`: a histogram of the durations of calls."""

import threading
from bisect import bisect_left
from dataclasses import dataclass

BOUNDS_S = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
"""Upper bounds of the histogram's buckets in seconds; a last bucket has all longer durations."""


@dataclass(frozen=True, slots=True)
class Latency:
    """The durations of calls, in seconds."""

    count: int = 0
    sum_s: float = 0.0
    max_s: float = 0.0
    buckets: tuple[int, ...] = (0,) * (len(BOUNDS_S) + 1)
    """Number of durations in each bucket of `BOUNDS_S`, and above the last bound."""

    @property
    def mean_s(self) -> float:
        """The mean duration in seconds; 0 without calls."""
        return self.sum_s / self.count if self.count else 0.0


class Timer:
    """Collects a `Latency`, at the cost of a microsecond per call. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sum = self._max = 0.0
        self._buckets = [0] * (len(BOUNDS_S) + 1)

    def add(self, seconds: float) -> None:
        """Add one duration."""
        place = bisect_left(BOUNDS_S, seconds)
        with self._lock:
            self._sum += seconds
            self._max = max(self._max, seconds)
            self._buckets[place] += 1

    def latency(self) -> Latency:
        """A snapshot of the durations so far."""
        with self._lock:
            return Latency(sum(self._buckets), self._sum, self._max, tuple(self._buckets))
