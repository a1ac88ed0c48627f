"""`EvictionPolicy`: the contract of a policy."""

from abc import ABC, abstractmethod
from collections.abc import Callable


def anything(_: int) -> bool:
    """True: every id may be evicted."""
    return True


class EvictionPolicy(ABC):
    """Chooses which of the ids held is evicted first.

    A policy only names a victim. Its owner, a tier or the store of decoded memory, evicts it and then calls `removed`,
    so the two never disagree about what is held. Every method is called under the owner's lock: a policy needs none of
    its own, and must not block. ``slots`` is the number of blocks that the owner can hold.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots

    @abstractmethod
    def admitted(self, id: int) -> None:
        """``id`` is held now. It was not before."""

    @abstractmethod
    def touched(self, id: int) -> None:
        """``id``, which is held, was read."""

    def scored(self, id: int, score: float) -> None:  # noqa: B027 - most policies look at no scores
        """``id``, which is held, was chosen by retrieval with this score in [-1, 1]."""

    @abstractmethod
    def removed(self, id: int) -> None:
        """``id`` is held no longer, evicted or discarded."""

    @abstractmethod
    def victim(self, is_evictable: Callable[[int], bool] = anything) -> int | None:
        """The id to evict first among those that ``is_evictable`` allows, or None if it allows none."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of ids held."""
