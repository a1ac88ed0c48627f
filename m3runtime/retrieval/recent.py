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
        while True:
            with self._lock:
                found = self._results.get(key)
                if found is not None:
                    self._results.move_to_end(key)
                else:
                    mine = self._results[key] = Future[V]()
                    if len(self._results) > self._most:
                        self._results.popitem(last=False)
            if found is None:
                break
            if found.exception() is None:  # waits
                return found.result()
        try:
            result = compute()
        except BaseException as error:
            with self._lock:
                if self._results.get(key) is mine:
                    del self._results[key]
            mine.set_exception(error)
            raise
        mine.set_result(result)
        return result
