"""`CheckedTier`: one tier as the hierarchy uses it. Reads are checked, timed and counted."""

import threading
import time
from abc import ABC, abstractmethod

import numpy as np
from torch import Tensor

from m3runtime.errors import BlockError
from m3runtime.memory.block import Found, Ids, Stamps, check
from m3runtime.observe.counts import TierStats, increased
from m3runtime.observe.latency import Timer
from m3runtime.storage.tier import Tier


class CheckedTier(ABC):
    """A caching tier or the home, as a hierarchy reads it. Thread-safe.

    ``is_checked``: are the digests of its blocks checked? The CPU does that, so it reads into RAM then.
    """

    def __init__(self, tier: Tier, stamp: Stamps, *, is_checked: bool) -> None:
        self.tier = tier
        self.is_checked = is_checked
        self.reads = Timer()
        """Durations of the calls that read from the tier, checks of digests included."""
        self._stats = TierStats(tier.name)
        self._counting_lock = threading.Lock()
        self._stamp = stamp

    def count(self, **more: int) -> None:
        """Add to these fields of `stats`."""
        with self._counting_lock:
            self._stats = increased(self._stats, **more)

    @property
    def stats(self) -> TierStats:
        """A snapshot of the counts."""
        return self._stats

    def read(self, ids: Ids, out: Tensor, *, lifting: bool) -> Found | None:
        """``bool[n]``: the rows filled with the right bytes; None if the tier failed. Raises what the home raises.

        Counted as `lifted` while ``lifting``. Rows that are not found have no meaning afterwards.
        """
        found = None
        began = time.perf_counter()
        try:
            found = self._read(ids, out)
        finally:  # also where the home raises
            self.reads.add(time.perf_counter() - began)
            if found is None and not lifting:
                self.count(unanswered=len(ids))
        if found is not None:
            hits = int(found.sum())
            if lifting:
                self.count(lifted=hits)
            else:
                self.count(hits=hits, misses=len(ids) - hits, bytes=hits * self.tier.slot_bytes)
        return found

    @abstractmethod
    def _read(self, ids: Ids, out: Tensor) -> Found | None:
        """The same, not counted."""

    def _bad(self, ids: Ids, blocks: Tensor, found: Found) -> dict[int, str]:
        """Maps each row that was found and is not the block that it should be to the reason."""
        bad, rows = dict[int, str](), blocks.numpy()
        for row in np.flatnonzero(found).tolist():
            try:
                check(rows[row], id=int(ids[row]), stamp=self._stamp)
            except BlockError as error:
                bad[row] = str(error)
        return bad
