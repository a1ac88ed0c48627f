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
    _requests: Counter[tuple[str, int]] = field(default_factory=Counter)
    _tokens: Counter[str] = field(default_factory=Counter)
    _answers: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count_request(self, route: str, status: int) -> None:
        """Count a request by its route and status."""
        with self._lock:
            self._requests[route, status] += 1

    def count_tokens(self, **tokens: int) -> None:
        """Count tokens by kind: ``prompt``, ``answer``."""
        with self._lock:
            self._tokens.update(tokens)

    def count_answer(self, end: str) -> None:
        """Count an answer by how it ended."""
        with self._lock:
            self._answers[end] += 1

    def snapshot(self) -> tuple[Counter[tuple[str, int]], Counter[str], Counter[str]]:
        """Requests by route and status, tokens by kind, answers by end."""
        with self._lock:
            return self._requests.copy(), self._tokens.copy(), self._answers.copy()
