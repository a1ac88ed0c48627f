"""`Level`: one tier as the hierarchy uses it. Reads are checked, timed and counted."""

import threading
import time
from abc import ABC, abstractmethod

import numpy as np
from torch import Tensor

from m3runtime.errors import BlockError
from m3runtime.memory.block import BlockStamp, Found, Ids, check
from m3runtime.observe.counts import TierStats, increased
from m3runtime.observe.latency import Timer
from m3runtime.storage.tier import Tier


class Tally:
    """The counts of one tier. Thread-safe."""

    def __init__(self, name: str) -> None:
        self.reads = Timer()
        """Durations of the calls that read from the tier, checks of digests included."""
        self._stats = TierStats(name)
        self._lock = threading.Lock()

    def add(self, **more: int) -> None:
        """Add to these counts."""
        with self._lock:
            self._stats = increased(self._stats, **more)

    def stats(self) -> TierStats:
        """A snapshot of the counts."""
        with self._lock:
            return self._stats


class Level(ABC):
    """A caching tier or the home, as a hierarchy reads it. Thread-safe.

    ``is_checked``: are the digests of its blocks checked? The CPU does that, so it reads into RAM then.
    """

    def __init__(self, tier: Tier, stamp: BlockStamp, *, is_checked: bool) -> None:
        self.tier = tier
        self.is_checked = is_checked
        self.tally = Tally(tier.name)
        self._stamp = stamp

    def read(self, ids: Ids, out: Tensor, *, lifting: bool) -> Found | None:
        """Which rows the tier filled with the right bytes; None if it cannot answer. Raises what the home raises.

        Counted as `lifted` while ``lifting``. Rows that are not found have no meaning afterwards.
        """
        found = None
        began = time.perf_counter()
        try:
            found = self._read(ids, out)
        finally:  # also where the home raises
            self.tally.reads.add(time.perf_counter() - began)
            if found is None and not lifting:
                self.tally.add(unanswered=len(ids))
        if found is not None:
            hits = int(found.sum())
            if lifting:
                self.tally.add(lifted=hits)
            else:
                self.tally.add(hits=hits, misses=len(ids) - hits, bytes=hits * self.tier.slot_bytes)
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
