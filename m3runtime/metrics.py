"""Counts of what recall did."""

import threading
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class RecallCounts:
    """What recall did so far. Each count only grows."""

    chunks: int = 0
    memories: int = 0
    """Memories given to chunks."""
    kept: int = 0
    """Of those, memories that the stream held already: neither read nor decoded."""
    late: int = 0
    """Memories that were chosen and had not arrived by the deadline."""
    search_s: float = 0.0
    """Seconds spent on embedding and search."""
    fetch_s: float = 0.0
    """Seconds spent on waiting, reading and decoding."""


class RecallStats:
    """Collects `RecallCounts`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = RecallCounts()

    def count(self, **more: float) -> None:
        """Add to counts, by name."""
        with self._lock:
            self._counts = replace(
                self._counts, **{name: getattr(self._counts, name) + value for name, value in more.items()}
            )

    def snapshot(self) -> RecallCounts:
        """The counts now."""
        with self._lock:
            return self._counts
