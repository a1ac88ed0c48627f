"""`Lease`: the right to read a decoded memory, and the entries of a `m3runtime.recall.memory_store.MemoryStore`."""

from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

from m3runtime.documents.reference import Reference

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Part = tuple["Tensor", "Tensor"]
"""Keys and values of one decoded memory on the device, each ``[layers, kv_heads, tokens, head_dim]``."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A part, its reference, and the event after which the part may be read (None: at once)."""

    part: Part
    reference: Reference
    ready: "torch.Event | None" = None

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values."""
        return sum(tensor.nbytes for tensor in self.part)


@dataclass(eq=False, slots=True)
class Entry:
    """One memory in one dtype. Its fields belong to the store and change under the store's lock."""

    id: int
    dtype: "torch.dtype"
    handle: int
    """Its id for the eviction policy. No handle is used twice."""
    size: int = 0
    """Bytes that it takes; until it is ready, the most that it may take; 0 once it is gone and nobody reads it."""
    state: Literal["wanted", "loading", "ready", "gone"] = "wanted"
    loader: object = None
    """A token of whoever claimed it."""
    loaded: Loaded | None = None
    done: "Future[None]" = field(default_factory=Future)
    """Done when the entry is ready or gone; has the error if its load failed."""
    leases: int = 0
    guesses: int = 0
    is_used: bool = False
    """Did a recall ever lease it?"""


class Lease:
    """The right to read one part: a leased part is not evicted. `MemoryStore.release` ends it.

    A **guess** is the lease of a prefetch. It protects the part from other prefetches, not from a recall that needs
    the room. A lease that is dropped without release, by a stream that nobody closed or by an interrupt, gives itself
    back.
    """

    __slots__ = ("_dropped", "entry", "is_guess", "is_live")

    def __init__(self, entry: Entry, dropped: "deque[Lease]", *, is_guess: bool) -> None:
        self.is_live = False  # until the store has counted it
        self.entry = entry
        self.is_guess = is_guess
        self._dropped = dropped

    @property
    def id(self) -> int:
        """The memory's id."""
        return self.entry.id

    @property
    def loaded(self) -> Loaded:
        """The part, for a lease of an entry that is ready."""
        assert self.entry.loaded is not None, "only a ready part can be read"
        return self.entry.loaded

    def __del__(self) -> None:
        # No lock here: garbage is collected at any instruction, also of whoever holds it.
        if getattr(self, "is_live", False):  # an interrupt may have ended `__init__`
            self._dropped.append(self)


class Leased(NamedTuple):
    """The result of `MemoryStore.lease`."""

    leases: list[Lease]
    beyond: list[int]
    """Ids that there is no room for."""
    blocked_by: "list[Future[None]]"
    """If there are any: the loads under way of prefetches alone. Once one is done, a recall may evict its part."""
