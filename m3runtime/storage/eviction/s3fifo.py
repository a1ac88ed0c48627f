"""`S3FifoPolicy`: three queues (Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023)."""

from collections import OrderedDict
from collections.abc import Callable

from m3runtime.storage.eviction.base import EvictionPolicy, anything

MOST_USES = 3
"""Uses are counted no further."""


class S3FifoPolicy(EvictionPolicy):
    """Evicts early what is used once, so that a scan does not push out what is used again and again.

    A new block enters the *small* queue, a tenth of the slots. At its end it goes on to the *main* queue if it was
    used more than once since, and is evicted otherwise; its id then stays for a while in the *ghost* queue, from
    where it comes back straight to main. Main gives a block that was used another round for each use. A block that
    is not evictable keeps its place and its uses.
    """

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._share = max(1, slots // 10)
        self._ghosts = max(0, slots - self._share)
        self._small: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._main: OrderedDict[int, None] = OrderedDict()
        self._ghost: OrderedDict[int, None] = OrderedDict()  # not held
        self._uses: dict[int, int] = {}

    def admitted(self, id: int) -> None:
        """Add an id; see `EvictionPolicy.admitted`."""
        known = id in self._ghost
        self._ghost.pop(id, None)
        (self._main if known else self._small)[id] = None
        self._uses[id] = 0

    def touched(self, id: int) -> None:
        """Count a use; see `EvictionPolicy.touched`."""
        self._uses[id] = min(self._uses[id] + 1, MOST_USES)

    def removed(self, id: int) -> None:
        """Drop an id; see `EvictionPolicy.removed`."""
        del self._uses[id]
        if id in self._main:
            del self._main[id]
            return
        del self._small[id]
        self._ghost[id] = None  # also if it was discarded: ids of forgotten blocks never come back
        while len(self._ghost) > self._ghosts:
            self._ghost.popitem(last=False)

    def victim(self, is_evictable: Callable[[int], bool] = anything) -> int | None:
        """The id to evict first; see `EvictionPolicy.victim`. O(1), amortised, and for each id not evictable."""
        order = [self._of_main, self._of_small, self._of_main]  # what is in small may move on to main
        if len(self._small) >= self._share:
            order = order[1:]
        return next((found for queue in order if (found := queue(is_evictable)) is not None), None)

    def __len__(self) -> int:
        return len(self._uses)

    def _of_small(self, is_evictable: Callable[[int], bool]) -> int | None:
        found, moving = None, []
        for id in filter(is_evictable, self._small):
            if self._uses[id] <= 1:
                found = id
                break
            moving.append(id)
        for id in moving:
            del self._small[id]
            self._main[id] = None
            self._uses[id] = 0
        return found

    def _of_main(self, is_evictable: Callable[[int], bool]) -> int | None:
        for _ in range(MOST_USES + 1):  # after so many rounds none has uses left
            found, again = None, []
            for id in filter(is_evictable, self._main):
                if self._uses[id] == 0:
                    found = id
                    break
                again.append(id)
            for id in again:
                self._main.move_to_end(id)
                self._uses[id] -= 1
            if found is not None:
                return found
        return None
