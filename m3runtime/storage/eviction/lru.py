"""`LruPolicy`: least recently used."""

from collections import OrderedDict
from collections.abc import Callable

from m3runtime.storage.eviction.base import EvictionPolicy, anything


class LruPolicy(EvictionPolicy):
    """Evicts the block that was used longest ago."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._order: OrderedDict[int, None] = OrderedDict()

    def admitted(self, id: int) -> None:
        """Add an id; see `EvictionPolicy.admitted`."""
        self._order[id] = None

    def touched(self, id: int) -> None:
        """Count a use; see `EvictionPolicy.touched`."""
        self._order.move_to_end(id)

    def removed(self, id: int) -> None:
        """Drop an id; see `EvictionPolicy.removed`."""
        del self._order[id]

    def victim(self, is_evictable: Callable[[int], bool] = anything) -> int | None:
        """The id used longest ago; see `EvictionPolicy.victim`. O(1), amortised, and for each id not evictable.

        An id that is not evictable is in use, so it counts as used now: the next call does not pass over it again.
        """
        in_use: list[int] = []
        for id in self._order:
            if is_evictable(id):
                for other in in_use:
                    self._order.move_to_end(other)
                return id
            in_use.append(id)
        return None

    def __len__(self) -> int:
        return len(self._order)
