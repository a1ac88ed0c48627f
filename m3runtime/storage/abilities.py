"""What a tier may have beyond its contract. The runtime uses an ability where it is there."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from m3runtime.memory.block import Ids


@dataclass(frozen=True, slots=True)
class Damage:
    """Something in a bank that is not as it should be."""

    where: str
    """What it is about: ``block``, ``reference``, ``embedding``, ``home``, ``index``, ``codec`` or ``manifest``."""
    id: int | None
    """The memory that it concerns, or None for the bank as a whole."""
    what: str
    """What is wrong, to be read after the two above."""


@runtime_checkable
class Persistent(Protocol):
    """A caching tier whose blocks outlive the process. One without this is empty when it is opened."""

    def ids(self) -> Ids:
        """All ids held, in any order: what was forgotten meanwhile is discarded when a hierarchy takes the tier."""


@runtime_checkable
class Auditable(Protocol):
    """A home that can look for damage in its own books: whatever `Home`'s methods alone do not show."""

    def audit(self, progress: Callable[[int, int], None] | None = None) -> Iterator[Damage]:
        """Walk everything but the blocks' payloads and yield what is wrong. Changes nothing.

        ``progress`` is called with the steps done, of how many.
        """
