"""`ServeMeter`: counts of requests and answers, and their latencies."""

import threading
from collections import Counter
from dataclasses import dataclass, field

from m3runtime.observe.latency import Timer


@dataclass(slots=True)
class ServeMeter:
    """Collects what the server did. Thread-safe."""

    first_token: Timer = field(default_factory=Timer)
    """From the submission of an answer to its first token."""
    between_tokens: Timer = field(default_factory=Timer)
    """From one token of an answer to its next."""
    requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Requests by route and HTTP status."""
    tokens: Counter[str] = field(default_factory=Counter)
    """Tokens by kind: ``prompt``, ``memory``, ``answer``."""
    answers: Counter[str] = field(default_factory=Counter)
    """Answers by how they ended."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, counts: "Counter[str]", **more: int) -> None:
        """Increase counts, by name."""
        with self._lock:
            counts.update(more)

    def count_request(self, route: str, status: int) -> None:
        """Count a request by its route and status."""
        with self._lock:
            self.requests[route, status] += 1
