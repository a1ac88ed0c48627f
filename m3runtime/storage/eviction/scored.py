"""`ScoredPolicy`: keeps blocks that retrieval scored high and lately."""

import heapq
from collections.abc import Callable
from math import exp2, log2

from m3runtime.storage.eviction.base import EvictionPolicy, anything

HALF_LIFE = 0.5
"""Uses of any blocks, in multiples of the slots, after which a use counts half."""
GAIN = 2.0
"""A score of 1 weighs ``2**GAIN`` times as much as one of 0. Both as docs/eviction.md found them best on its traces."""


class ScoredPolicy(EvictionPolicy):
    """Evicts the block whose uses, weighted by score and faded with time, add up to the least.

    A use weighs 1, and ``2**(GAIN * score)`` more with a score. Time is counted in uses; every ``HALF_LIFE * slots`` of
    them each weight halves. As all fade alike, the order of two blocks changes only when one is used: what is kept for
    a block is the logarithm of its sum as seen from time 0. Times grow by one for each half-life, and a float tells
    2**52 uses apart. With one weight for all this is LRFU (Lee et al., 2001), between LRU and LFU.
    """

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._half_life = HALF_LIFE * max(1, slots)
        self._time = 0
        self._sums: dict[int, float] = {}
        self._numbers: dict[int, int] = {}
        # (sum, number of its admission, id), the least first. Sums only grow: one that is out of date is too small, and
        # is put right when it comes to the top. Removed ids are dropped when they come to the top.
        self._heap: list[tuple[float, int, int]] = []

    def admitted(self, id: int) -> None:
        """Add an id; see `EvictionPolicy.admitted`."""
        self._time += 1
        self._sums[id] = self._time / self._half_life
        self._numbers[id] = self._time
        if len(self._heap) >= 2 * len(self._sums) + 8:  # discarded blocks, for which no room was needed
            self._heap = [(total, self._numbers[held], held) for held, total in self._sums.items()]
            heapq.heapify(self._heap)
        else:
            heapq.heappush(self._heap, (self._sums[id], self._time, id))

    def touched(self, id: int) -> None:
        """Count a use; see `EvictionPolicy.touched`."""
        self._time += 1
        self._add(id, 0.0)

    def scored(self, id: int, score: float) -> None:
        """Weigh a use by its score; see `EvictionPolicy.scored`. The use was counted already, so no time passes."""
        self._add(id, GAIN * min(1.0, max(-1.0, score)))  # in this order not a number is -1

    def removed(self, id: int) -> None:
        """Drop an id; see `EvictionPolicy.removed`."""
        del self._sums[id], self._numbers[id]

    def victim(self, is_evictable: Callable[[int], bool] = anything) -> int | None:
        """The id with the least sum; see `EvictionPolicy.victim`. O(log n), amortised, and per id not evictable."""
        kept, found = [], None
        while self._heap and found is None:
            total, number, id = self._heap[0]
            if self._numbers.get(id) != number:
                heapq.heappop(self._heap)
            elif total != self._sums[id]:
                heapq.heapreplace(self._heap, (self._sums[id], number, id))
            elif is_evictable(id):
                found = id
            else:
                kept.append(heapq.heappop(self._heap))
        for entry in kept:
            heapq.heappush(self._heap, entry)
        return found

    def __len__(self) -> int:
        return len(self._sums)

    def _add(self, id: int, log_weight: float) -> None:
        """``log2(2**sum + 2**(log_weight + age of the world))``, without leaving the logarithm."""
        old, new = self._sums[id], log_weight + self._time / self._half_life
        high, low = max(old, new), min(old, new)
        self._sums[id] = high + log2(1 + exp2(low - high))
