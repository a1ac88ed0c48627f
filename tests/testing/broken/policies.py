"""Eviction policies with one mistake each."""

from collections.abc import Callable
from typing import ClassVar

from m3runtime.storage.eviction import EvictionPolicy, LruPolicy
from m3runtime.storage.eviction.base import anything
from m3runtime.testing.eviction import EvictionContract
from tests.testing.broken.suites import make_suites


class NamesWhatIsLeased(LruPolicy):
    def victim(self, is_evictable: Callable[[int], bool] = anything) -> int | None:
        found = super().victim(is_evictable)
        return next(iter(self._order), None) if found is None else found


class NamesWhatIsRemoved(LruPolicy):
    """Keeps the victim that it named last in mind, removed or not."""

    last: int | None = None

    def victim(self, is_evictable: Callable[[int], bool] = anything) -> int | None:
        if self.last is None or not is_evictable(self.last):
            self.last = super().victim(is_evictable)
        return self.last


class ForgetsAnId(LruPolicy):
    """Loses what was used very often."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self.uses: dict[int, int] = {}

    def touched(self, id: int) -> None:
        self.uses[id] = self.uses.get(id, 0) + 1
        if self.uses[id] == 5:
            self._order.pop(id, None)
        elif id in self._order:
            super().touched(id)


class RemovesOnItsOwn(LruPolicy):
    def victim(self, is_evictable: Callable[[int], bool] = anything) -> int | None:
        found = super().victim(is_evictable)
        if found is not None:
            del self._order[found]
        return found

    def removed(self, id: int) -> None:
        self._order.pop(id, None)


class LooksAtTheOldestAlone(LruPolicy):
    def victim(self, is_evictable: Callable[[int], bool] = anything) -> int | None:
        return next((id for id in list(self._order)[:6] if is_evictable(id)), None)


class Policies(EvictionContract):
    kind: ClassVar[type[LruPolicy]]

    def make(self, slots: int) -> EvictionPolicy:
        return self.kind(slots)


BROKEN = LruPolicy.__subclasses__()
globals().update(make_suites(Policies, __name__, LruPolicy, BROKEN))
