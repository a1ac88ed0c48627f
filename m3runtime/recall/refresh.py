"""`Refresh`: a running process sees what others changed in its bank, and what has expired."""

import threading
import time
from collections.abc import Callable, Sequence

from m3runtime.bank import records
from m3runtime.bank.bank import Bank
from m3runtime.bank.index import catch_up
from m3runtime.documents import expiry
from m3runtime.memory.block import as_ids, without
from m3runtime.recall.memory_store import MemoryStore
from m3runtime.retrieval.derived import Derived
from m3runtime.storage.hierarchy import Hierarchy


class Refresh:
    """Brings indexes, store and caching tiers in line with a home that another process changed. Thread-safe.

    It looks every ``every`` seconds at the cost of reading a number: in the thread that asks then, or up to half of the
    time earlier in the background, if hints come. Only if the home has another revision it compares ids, which takes
    about half a second of CPU time for a million; other threads go on with what they had. With None it never looks.

    When a day has ended in UTC, what has expired leaves indexes, store and caching tiers before the next call returns,
    in whatever thread. The home keeps it until a process that writes forgets it.
    """

    def __init__(
        self,
        bank: Bank,
        indexes: Sequence[Derived],
        store: MemoryStore,
        hierarchy: Hierarchy,
        every: float | None,
        *,
        cold: bool,
        today: Callable[[], str] = expiry.today,
    ) -> None:
        """The ``indexes`` are in line with the home now; with ``cold`` they have cold references, too."""
        self._bank = bank
        self._indexes = indexes
        self._store = store
        self._hierarchy = hierarchy
        self._every = every
        self._cold = cold
        self._lock = threading.Lock()
        self._revision = bank.home.revision()
        self._looked = time.monotonic()
        self._today = today
        self._day = ""

    def __call__(self) -> None:
        """Look, if it is time. Raises what the home raises."""
        if self._today() != self._day:
            with self._lock:
                self._expire(self._today())
        if self._every is not None and time.monotonic() - self._looked >= self._every:
            self._look_unless_busy()

    @property
    def is_near(self) -> bool:
        """Has half of the time passed until the next look? Then `ahead` is for a thread in the background."""
        return self._every is not None and time.monotonic() - self._looked >= self._every / 2

    def ahead(self) -> None:
        """Look before it is time, so that the next call need not: a home in an object store answers late."""
        if self.is_near:
            try:
                self._look_unless_busy()
            except BaseException:
                self._looked = float("-inf")  # the next call looks itself, and raises
                raise

    def now(self) -> None:
        """Look now, whatever ``every`` says: what was committed before the call counts when it returns."""
        with self._lock:
            self._expire(self._today())
            self._look()

    def _look_unless_busy(self) -> None:
        if self._lock.acquire(blocking=False):
            try:
                self._look()
            finally:
                self._lock.release()

    def _look(self) -> None:
        self._looked = time.monotonic()
        revision = self._bank.home.revision()
        if revision != self._revision:
            self._catch_up()
            self._revision = revision

    def _expire(self, today: str) -> None:
        if today != self._day:
            due = [id for ids in self._bank.home.expiring(today).values() for id in ids.tolist()]
            expired = records.expired(self._bank.home, today)
            for index in self._indexes:
                index.remove(expired)
            self._hierarchy.forget(due)
            self._store.forget(due)  # also what is still cited from elsewhere
            self._day = today

    def _catch_up(self) -> None:
        before = self._indexes[0].ids()
        hidden = records.expired(self._bank.home, self._day)
        for index in self._indexes:
            catch_up(index, self._bank, cold=self._cold, hidden=hidden)
        gone = without(before, self._indexes[0].ids()).tolist()
        self._hierarchy.forget(gone)
        held = self._store.references()
        found = self._bank.home.references(as_ids(list(held)))
        moved = [id for (id, one), now in zip(held.items(), found, strict=True) if one != now]  # places, too
        self._store.forget([*gone, *moved])
