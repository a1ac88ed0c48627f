"""`Together` and `Recent`: what several threads ask for at the same time is done once."""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

Q = TypeVar("Q")
S = TypeVar("S")
R = TypeVar("R")
K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class _Ticket(Generic[Q, R]):
    def __init__(self, request: Q, kind: Hashable) -> None:
        self.request = request
        self.kind = kind
        self.is_taken = False
        self.is_over = False
        self.result: list[R] = []
        """Empty if it has to be done alone."""


class Together(Generic[Q, S, R]):
    """Serves requests of several threads in batches, in two steps: ``first`` of the next begins after that of the last.

    Nobody waits for more requests to come: a thread whose request finds ``first`` free serves it at once, and with it
    all of the same ``kind`` that came while ``first`` was not free. Where a batch fails, each thread serves its own
    request alone: the error of one is nobody else's. Thread-safe; holds no lock while it serves.
    """

    def __init__(
        self,
        first: Callable[[Sequence[Q]], S],
        second: Callable[[Sequence[Q], S], Sequence[R]],
        kind: Callable[[Q], Hashable],
    ) -> None:
        """``second`` takes the requests and what ``first`` returned; its results are in the order of the requests."""
        self._first = first
        self._second = second
        self._kind = kind
        self._change = threading.Condition()
        self._waiting: list[_Ticket[Q, R]] = []
        self._is_busy = False

    def __call__(self, request: Q) -> R:
        """The result of this request, or what serving it alone raised."""
        ticket = _Ticket[Q, R](request, self._kind(request))
        with self._change:
            self._waiting.append(ticket)
            try:
                self._change.wait_for(lambda: ticket.is_over or not (ticket.is_taken or self._is_busy))
            except BaseException:  # such as Ctrl-C
                if not ticket.is_taken:
                    self._waiting.remove(ticket)
                raise
            batch = [] if ticket.is_over else [one for one in self._waiting if one.kind == ticket.kind]
            if batch:
                self._waiting = [one for one in self._waiting if one.kind != ticket.kind]
                self._is_busy = True
                for one in batch:
                    one.is_taken = True
        if batch:
            self._serve(batch)
        return ticket.result[0] if ticket.result else self._second([request], self._first([request]))[0]

    def _serve(self, batch: Sequence[_Ticket[Q, R]]) -> None:
        requests = [one.request for one in batch]
        try:
            try:
                found = self._first(requests)
            finally:
                with self._change:
                    self._is_busy = False
                    self._change.notify_all()
            for one, result in zip(batch, self._second(requests, found), strict=True):
                one.result.append(result)
        except Exception:  # of several, each tries alone: the one that fails raises in its own thread
            if len(batch) == 1:
                raise
        finally:
            with self._change:
                for one in batch:
                    one.is_over = True
                self._change.notify_all()
