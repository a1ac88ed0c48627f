"""Eviction policies: which block a full caching tier gives up. Plain Python over ids."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from m3runtime.errors import ConfigError


class EvictionPolicy(ABC):
    """Orders the ids that a tier holds by how gladly it would lose them.

    A policy only names a victim. The tier evicts it and says so with `removed`, so the two never disagree
    about what is held. Every method is called under the tier's lock: a policy needs none of its own, and
    must not block. ``slots`` is how many blocks the tier can hold.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots

    @abstractmethod
    def admitted(self, id: int) -> None:
        """The tier holds ``id`` now. It did not before."""

    @abstractmethod
    def touched(self, id: int) -> None:
        """``id``, which is held, was read."""

    @abstractmethod
    def removed(self, id: int) -> None:
        """The tier holds ``id`` no longer, evicted or discarded."""

    @abstractmethod
    def victim(self, evictable: Callable[[int], bool]) -> int | None:
        """The id to give up first among those that ``evictable`` allows, or None if it allows none."""

    @abstractmethod
    def __len__(self) -> int:
        """How many ids are held."""


@runtime_checkable
class ScoreAware(Protocol):
    """A policy that may have this looks at what retrieval thought of a block."""

    def scored(self, id: int, score: float) -> None:
        """``id``, which is held, was chosen by retrieval with this score in [-1, 1]."""


class LruPolicy(EvictionPolicy):
    """Gives up what was used longest ago."""

    def __init__(self, slots: int) -> None:
        super().__init__(slots)
        self._order: OrderedDict[int, None] = OrderedDict()

    def admitted(self, id: int) -> None:
        """See `EvictionPolicy.admitted`."""
        self._order[id] = None

    def touched(self, id: int) -> None:
        """See `EvictionPolicy.touched`."""
        self._order.move_to_end(id)

    def removed(self, id: int) -> None:
        """See `EvictionPolicy.removed`."""
        del self._order[id]

    def victim(self, evictable: Callable[[int], bool]) -> int | None:
        """See `EvictionPolicy.victim`."""
        return next(filter(evictable, self._order), None)

    def __len__(self) -> int:
        return len(self._order)


POLICIES: dict[str, type[EvictionPolicy]] = {"lru": LruPolicy}


def make_policy(name: str, slots: int) -> EvictionPolicy:
    """A policy by its name in the configuration, for a tier of ``slots`` blocks. Raises `ConfigError`."""
    if name not in POLICIES:
        raise ConfigError(f"eviction must be one of {', '.join(POLICIES)}, not {name!r}")
    return POLICIES[name](slots)
