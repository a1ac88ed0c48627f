"""`CheckedCache`: a caching tier as the hierarchy uses it. Its faults are counted and never raised."""

from collections.abc import Callable, Iterator, Set
from contextlib import AbstractContextManager, contextmanager

import numpy as np
from torch import Tensor

from m3runtime.errors import TierError
from m3runtime.memory.block import Found, Ids, Stamps
from m3runtime.storage.abilities import Persistent
from m3runtime.storage.checked_tier import CheckedTier
from m3runtime.storage.tier import CachingTier, Scores


class CheckedCache(CheckedTier):
    """A caching tier, what the hierarchy knows of it, and the discards that it owes.

    A discard that failed is tried again before the tier is asked for anything. Until it succeeds the tier is asked for
    nothing, since it may hold what is forgotten. A tier whose blocks outlive the process is first asked what it holds;
    ``remembered`` says which of that are still in the home, or None if the home fails.

    Whatever changes the tier (all but `read` and `contains`) is called under ``changing``, a lock that all caches
    of a hierarchy share.
    """

    def __init__(
        self,
        tier: CachingTier,
        stamp: Stamps,
        remembered: Callable[[Ids], Found | None],
        changing: AbstractContextManager[object],
    ) -> None:
        # What outlives the process may be another bank's, whatever the tier says of itself.
        super().__init__(tier, stamp, is_checked=tier.can_rot or isinstance(tier, Persistent))
        self.caching = tier
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
                    self.tier.discard(np.array(sorted(self._discards), np.uint64))
                    self._discards.clear()
            return self._unlisted is None and not self._discards

    def contains(self, ids: Ids) -> Found:
        """``bool[n]``: the ids that the tier can answer with now."""
        if self.is_usable():
            with self._counting():
                return self.tier.contains(ids)
        return np.zeros(len(ids), np.bool_)

    def write(self, ids: Ids, blocks: Tensor) -> bool:
        """Hold these blocks. False if the tier failed."""
        with self._counting():
            self.tier.write(ids, blocks)
            return True
        return False

    def forget(self, ids: Set[int]) -> None:
        """Discard these ids, now or before the tier is asked for anything else."""
        self._discards |= ids
        self.is_usable()

    def score(self, ids: Ids, scores: Scores) -> None:
        """Pass on scores; see `CachingTier.score`."""
        if self.is_usable():
            with self._counting():
                self.caching.score(ids, scores)

    def close(self) -> None:
        """Close the tier; see `Tier.close`."""
        with self._counting():
            self.tier.close()

    def _read(self, ids: Ids, out: Tensor) -> Found | None:
        if not self.is_usable():
            return None
        with self._counting():
            found = self.tier.read(ids, out)
            if self.is_checked and (bad := list(self._bad(ids, out, found))):
                found = found.copy()
                found[bad] = False
                self.count(bad_blocks=len(bad))
                with self._changing:
                    self.forget(set(ids[bad].tolist()))
            return found
        return None

    def _list(self) -> None:
        """Owe the discard of all blocks that the tier was opened with and the home does not have."""
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
            self.count(faults=1)
