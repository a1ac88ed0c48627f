"""`Cache`: a caching tier as the hierarchy uses it, whose faults are counted and never raised."""

import threading
from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import numpy as np
from torch import Tensor

from m3runtime.errors import TierError
from m3runtime.memory.block import Found, Ids
from m3runtime.observe.latency import Timer
from m3runtime.observe.tiers import TierStats
from m3runtime.storage.abilities import Persistent
from m3runtime.storage.tier import CachingTier, Scores


class Tally:
    """Counts what one tier does. Thread-safe."""

    def __init__(self, name: str) -> None:
        self.reads = Timer()
        """Calls that read from the tier, checks of what came included."""
        self._stats = TierStats(name)
        self._lock = threading.Lock()

    def add(self, **more: int) -> None:
        """Raise these counts by these numbers."""
        with self._lock:
            self._stats = replace(self._stats, **{key: getattr(self._stats, key) + by for key, by in more.items()})

    def stats(self) -> TierStats:
        """A snapshot."""
        with self._lock:
            return self._stats


class Cache:
    """A caching tier, what the hierarchy knows of it, and what it owes.

    What it failed to discard is tried again before it is asked for anything, and until that succeeds it is asked
    for nothing: it may hold what is forgotten. A tier whose blocks outlive the process
    is asked first what it holds; ``remembered`` says which of that are still in the home, or None if the home fails.

    Whatever changes the tier (all but `read` and `contains`) is called under ``changing``, a lock that all caches
    of a hierarchy share.
    """

    def __init__(
        self,
        tier: CachingTier,
        remembered: Callable[[Ids], Found | None],
        changing: AbstractContextManager[object],
    ) -> None:
        self.tier = tier
        self.tally = Tally(tier.name)
        # What outlives the process may be another bank's, whatever the tier says of itself.
        self.is_checked = tier.can_rot or isinstance(tier, Persistent)
        self._remembered = remembered
        self._changing = changing
        self._unlisted = tier if isinstance(tier, Persistent) else None
        self._discards: set[int] = set()

    def is_usable(self) -> bool:
        """Settle what is owed. False while the tier may hold what is forgotten."""
        if self._unlisted is None and not self._discards:
            return True
        with self._changing:
            self._list()
            if self._unlisted is None and self._discards:
                with self._counting():
                    self.tier.discard(_array(self._discards))
                    self._discards.clear()
            return self._unlisted is None and not self._discards

    def read(self, ids: Ids, out: Tensor) -> Found | None:
        """See `Tier.read`. None if the tier cannot answer."""
        if self.is_usable():
            with self._counting():
                return self.tier.read(ids, out)
        return None

    def contains(self, ids: Ids) -> Found:
        """Which of these could be read from it now."""
        if self.is_usable():
            with self._counting():
                return self.tier.contains(ids)
        return np.zeros(len(ids), np.bool_)

    def write(self, ids: Ids, blocks: Tensor) -> bool:
        """See `Tier.write`. False if the tier did not take them."""
        with self._counting():
            self.tier.write(ids, blocks)
            return True
        return False

    def forget(self, ids: Set[int]) -> None:
        """Discard these, now or before anything else."""
        self._discards |= ids
        self.is_usable()

    def score(self, ids: Ids, scores: Scores) -> None:
        """See `CachingTier.score`."""
        if self.is_usable():
            with self._counting():
                self.tier.score(ids, scores)

    def close(self) -> None:
        """See `Tier.close`."""
        with self._counting():
            self.tier.close()

    def _list(self) -> None:
        """Owe the discard of what the tier brought along and the home does not have."""
        if self._unlisted is not None:
            with self._counting():
                held = self._unlisted.ids()
                remembered = self._remembered(held)
                if remembered is not None:
                    self._discards.update(held[~remembered].tolist())
                    self._unlisted = None

    @contextmanager
    def _counting(self) -> Iterator[None]:
        """A `TierError` ends the block, and is counted."""
        try:
            yield
        except TierError:
            self.tally.add(faults=1)


def _array(ids: Set[int]) -> Ids:
    return np.array(sorted(ids), np.uint64)
