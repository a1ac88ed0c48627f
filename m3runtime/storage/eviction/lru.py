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
        """The id used longest ago; see `EvictionPolicy.victim`. O(1) if it is evictable."""
        return next(filter(is_evictable, self._order), None)

    def __len__(self) -> int:
        return len(self._order)
