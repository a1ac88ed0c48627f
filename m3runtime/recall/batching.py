"""`Batched`: concurrent calls of several threads are served as one batch."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Generic, TypeVar

Q = TypeVar("Q")
R = TypeVar("R")


class Batched(Generic[Q, R]):
    """Serves requests in batches: the thread that finds it idle serves its own and all that came meanwhile.

    Nobody waits for more requests to come. Where a batch fails, each thread serves its own request alone, so that the
    error of one is nobody else's. An interrupt at any instruction leaves no thread waiting. Thread-safe.
    """

    def __init__(self, serve: Callable[[Sequence[Q]], Sequence[R]]) -> None:
        """``serve`` returns the results in the order of the requests. One call runs at a time, but for lone retries."""
        self._serve = serve
        self._serving = threading.Lock()
        self._lock = threading.Lock()
        self._waiting: list[tuple[Q, Future[R]]] = []

    def __call__(self, request: Q) -> R:
        """The result of this request, or the error of serving it alone."""
        future = Future[R]()
        with self._lock:
            self._waiting.append((request, future))
        with self._serving:
            if not future.done():
                self._serve_waiting(request, future)
        if future.cancelled():
            return self._serve([request])[0]
        return future.result()

    def _serve_waiting(self, request: Q, future: "Future[R]") -> None:
        """Serve this request and all that wait. After an interrupt the others serve themselves."""
        with self._lock:
            others = [(one, theirs) for one, theirs in self._waiting if theirs is not future and not theirs.done()]
            self._waiting.clear()
        batch = [(request, future), *others]
        try:
            results = self._serve([one for one, _ in batch])
            for (_, theirs), result in zip(batch, results, strict=True):
                theirs.set_result(result)
        except Exception:
            if not others:  # it was alone
                raise
        finally:
            for _, theirs in batch:
                theirs.cancel()  # nothing happens to one that is done
