"""`Recent`: a small cache of results; concurrent calls for one key compute it once."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Recent(Generic[K, V]):
    """Keeps the last ``most`` results. What another thread is computing is waited for. Thread-safe."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._results: OrderedDict[K, Future[V]] = OrderedDict()

    def __call__(self, key: K, compute: Callable[[], V]) -> V:
        """The result for ``key``. What another thread failed to compute is computed again; errors are not kept."""
        mine = Future[V]()
        while True:
            try:
                with self._lock:
                    found = self._results.setdefault(key, mine)
                    self._results.move_to_end(key)
                    if len(self._results) > self._most:
                        self._results.popitem(last=False)
                if found is mine:
                    mine.set_result(compute())
                    return mine.result()
            except BaseException as error:  # an interrupt too: nobody may wait for a result that never comes
                with self._lock:
                    if self._results.get(key) is mine:
                        del self._results[key]
                if not mine.done():
                    mine.set_exception(error)
                raise
            if found.exception() is None:  # waits
                return found.result()
