"""`MemoryStore`: the decoded memories of one device, bounded in bytes; the one owner of decoded memory.

An entry passes through these states::

    wanted ──claim──▶ loading ──settle──▶ ready ──evicted, forgotten──▶ gone
       └──────────────── failed, or nobody wants it any more ─────────▶ gone

The store reads and decodes nothing itself: whoever claims an entry loads it and settles it (`m3runtime.recall.loader`).
Everybody else waits for its future. The module needs torch for types alone.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from m3runtime.documents.reference import Reference
from m3runtime.errors import TierClosedError
from m3runtime.observe.counts import StoreCounts, increased
from m3runtime.storage.eviction import make_policy

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
    size: int
    """Bytes that it takes; until it is ready, the most that it may take."""
    state: Literal["wanted", "loading", "ready", "gone"] = "wanted"
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

    def __init__(self, entry: Entry, dropped: "deque[tuple[Entry, bool]]", *, is_guess: bool) -> None:
        self.entry = entry
        self.is_guess = is_guess
        self.is_live = False  # until it is counted
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
        if getattr(self, "is_live", False):
            self._dropped.append((self.entry, self.is_guess))


class MemoryStore:
    """A cache of parts by id and dtype, of at most ``capacity`` bytes.

    Leased, guessed, loading and idle parts count alike. A part without leases stays until the eviction policy names it.
    A recall evicts idle parts first, then guesses. Thread-safe: one lock covers the bookkeeping. Nothing is read,
    decoded or waited for while it is held. An interrupt (Ctrl-C) in any call leaves the store in order.
    """

    def __init__(
        self, capacity: int, part_bytes: "Callable[[torch.dtype], int]", *, slots: int, eviction: str = "lru"
    ) -> None:
        """``part_bytes`` gives the most bytes of one part in a dtype; ``slots`` is about how many parts fit.

        Raises `ConfigError` for an unknown ``eviction`` policy (see `m3runtime.storage.eviction`).
        """
        self.capacity = capacity
        self._part_bytes = part_bytes
        self._make_policy = partial(make_policy, eviction, slots)
        self._policy = self._make_policy()
        self._lock = threading.Lock()
        self._entries: dict[tuple[int, torch.dtype], Entry] = {}
        self._removed: set[Entry] = set()  # nobody finds these any more, but they are leased or loading
        self._ready: dict[int, Entry] = {}  # by handle: what the policy knows
        self._handles = 0
        self._dropped: deque[tuple[Entry, bool]] = deque()
        self._closed = False
        self._counts = StoreCounts(capacity)

    # -- leases ------------------------------------------------------------------------------------------------

    def lease(self, ids: Iterable[int], dtype: "torch.dtype", *, guess: bool = False) -> tuple[list[Lease], list[int]]:
        """Lease these memories, loaded or not. Also returns the ids that there is no room for.

        A memory that is not in the store is admitted as wanted; the caller sees to it that somebody claims it. A guess
        evicts only idle parts. Raises `TierClosedError` after `close`.
        """
        leases: list[Lease] = []
        beyond: list[int] = []
        with self._changing():
            if self._closed:
                raise TierClosedError("the memory store is closed")
            self._collect_dropped()
            new = []
            for id in ids:  # held ones first: making room for another must not evict them
                if (entry := self._entries.get((id, dtype))) is None:
                    new.append(id)
                    continue
                leases.append(self._add_lease(entry, guess=guess))
                if entry.state == "ready":
                    self._policy.touched(entry.handle)
                    self._count(hits=not guess)
            for id in new:
                size = self._part_bytes(dtype)
                if self._make_room(size, guess=guess):
                    leases.append(self._add_lease(self._admit(id, dtype, size), guess=guess))
                else:
                    beyond.append(id)
        return leases, beyond

    def share(self, leases: Iterable[Lease]) -> list[Lease]:
        """Another lease of each leased part, for another stream."""
        with self._changing():
            return [self._add_lease(lease.entry, guess=False) for lease in leases]

    def release(self, leases: Iterable[Lease]) -> None:
        """End leases. Releasing one twice is fine. A wanted entry that nobody leases any more is gone."""
        with self._changing():
            for lease in leases:
                if lease.is_live:
                    entry = lease.entry
                    lease.is_live = False  # an interrupt comes between calls, so not before the entry's count
                    if lease.is_guess:
                        entry.guesses -= 1
                    else:
                        entry.leases -= 1
                    self._ended(entry, is_guess=lease.is_guess)

    # -- loading -----------------------------------------------------------------------------------------------

    def claim(self, leases: Iterable[Lease], claimed: list[Entry] | None = None) -> list[Entry]:
        """Append the entries that nobody loads yet to ``claimed``, and return it.

        The caller must `settle` or `fail` each of them, also if an interrupt ends this call.
        """
        mine = [] if claimed is None else claimed
        with self._changing():
            for lease in leases:
                entry = lease.entry
                if entry.state == "wanted":
                    entry.state = "loading"
                    mine.append(entry)
        return mine

    def keep_wanted(self, entries: Sequence[Entry]) -> list[Entry]:
        """The claimed entries that somebody still leases; the others are gone and need not be loaded."""
        with self._changing():
            unwanted = [entry for entry in entries if not (entry.leases or entry.guesses)]
            for entry in unwanted:
                self._remove(entry)
        for entry in unwanted:
            entry.done.set_result(None)
        return [entry for entry in entries if entry not in unwanted]

    def settle(self, entry: Entry, loaded: Loaded | None) -> None:
        """Hand over the result of loading a claimed entry. None: the memory is not remembered, or its block is bad."""
        with self._changing():
            if loaded is not None:
                self._count(bytes=loaded.nbytes - entry.size, decoded=1)
                entry.size, entry.loaded = loaded.nbytes, loaded
            if loaded is None or entry in self._removed:  # it was forgotten meanwhile
                self._remove(entry)
            else:
                entry.state = "ready"
                self._ready[entry.handle] = entry
                self._policy.admitted(entry.handle)
        entry.done.set_result(None)

    def fail(self, entries: Iterable[Entry], error: BaseException) -> None:
        """Remove wanted or loading entries that will not be loaded; entries that are settled stay.

        Whoever waits for one of them gets the error.
        """
        failed = list(entries)
        with self._changing():
            for entry in failed:
                if entry.state in ("wanted", "loading"):
                    self._remove(entry)
        for entry in failed:
            if not entry.done.done():
                entry.done.set_exception(error)

    # -- the end of a memory -----------------------------------------------------------------------------------

    def forget(self, ids: Iterable[int]) -> None:
        """Remove every part of these memories: no later `lease` finds one, even if its load is under way."""
        forgotten = set(ids)
        with self._changing():
            for key, entry in list(self._entries.items()):
                if entry.id not in forgotten:
                    continue
                if entry.state == "ready":
                    self._remove(entry)
                else:  # its loader settles it
                    self._removed.add(entry)
                    del self._entries[key]

    def close(self) -> None:
        """Remove everything. A later `lease` raises; loads under way are settled by their loaders."""
        with self._changing():
            self._closed = True
            wanted = [entry for entry in self._entries.values() if entry.state == "wanted"]
            for entry in wanted:
                self._remove(entry)
            left = {entry.id for entry in self._entries.values()}
        for entry in wanted:
            entry.done.set_exception(TierClosedError("the memory store is closed"))
        self.forget(left)

    def counts(self) -> StoreCounts:
        """A snapshot."""
        with self._changing():
            self._collect_dropped()
            return replace(self._counts, parts=len(self._ready))

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless the counters agree with the entries. For tests: it walks over all entries."""
        with self._changing():
            self._collect_dropped()
            held = list(self._entries.values())
            every = [*held, *self._removed]
            assert all(self._entries[entry.id, entry.dtype] is entry for entry in held)
            assert not self._removed.intersection(held)
            assert {entry.handle for entry in held if entry.state == "ready"} == set(self._ready)
            assert len(self._policy) == len(self._ready)
            assert sum(entry.size for entry in every) == self._counts.bytes <= self.capacity
            assert sum(bool(entry.leases) for entry in every) == self._counts.leased
            assert sum(bool(entry.guesses) for entry in every) == self._counts.guessed
            assert all(entry.leases or entry.guesses for entry in held if entry.state == "wanted")

    # -- bookkeeping, under the lock ---------------------------------------------------------------------------

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Hold the lock. What an interrupt leaves half done is put in order."""
        with self._lock:
            try:
                yield
            except BaseException:
                self._repair()
                raise

    def _repair(self) -> None:
        """Derive all bookkeeping from the entries. The policy forgets in which order parts were used."""
        for key, entry in list(self._entries.items()):
            is_orphan = entry.state == "wanted" and not (entry.leases or entry.guesses)
            if is_orphan or entry.state == "gone" or entry in self._removed:
                self._removed.add(entry)
                del self._entries[key]
        for entry in list(self._removed):
            if entry.state != "loading":
                entry.state = "gone"
                if not entry.leases:
                    entry.size, entry.loaded = 0, None
        every = {entry for entry in self._removed if entry.state == "loading" or entry.leases or entry.guesses}
        self._removed = every
        self._ready = {entry.handle: entry for entry in self._entries.values() if entry.state == "ready"}
        self._policy = self._make_policy()
        for handle in self._ready:
            self._policy.admitted(handle)
        every = every.union(self._entries.values())
        self._counts = replace(
            self._counts,
            bytes=sum(entry.size for entry in every),
            leased=sum(bool(entry.leases) for entry in every),
            guessed=sum(bool(entry.guesses) for entry in every),
        )

    def _count(self, **more: int) -> None:
        self._counts = increased(self._counts, **more)

    def _ended(self, entry: Entry, *, is_guess: bool) -> None:
        """Count the end of a lease, once the entry has one less."""
        if is_guess:
            self._count(guessed=-(not entry.guesses))
        else:
            self._count(leased=-(not entry.leases))
        if entry.state == "wanted" and not (entry.leases or entry.guesses):
            self._remove(entry)
            entry.done.cancel()  # nobody waits
        self._reclaim(entry)

    def _collect_dropped(self) -> None:
        while self._dropped:
            entry, is_guess = self._dropped[0]
            if is_guess:
                entry.guesses -= 1
            else:
                entry.leases -= 1
            self._dropped.popleft()  # the first call after the entry's count: see `release`
            self._ended(entry, is_guess=is_guess)

    def _add_lease(self, entry: Entry, *, guess: bool) -> Lease:
        if guess:
            self._count(guessed=not entry.guesses)
        else:
            self._count(leased=not entry.leases)
            entry.is_used = True
        lease = Lease(entry, self._dropped, is_guess=guess)
        lease.is_live = True  # without a call before the entry's count: see `release`
        if guess:
            entry.guesses += 1
        else:
            entry.leases += 1
        return lease

    def _admit(self, id: int, dtype: "torch.dtype", size: int) -> Entry:
        self._handles += 1
        self._count(bytes=size)
        entry = self._entries[id, dtype] = Entry(id, dtype, self._handles, size)
        return entry

    def _make_room(self, size: int, *, guess: bool) -> bool:
        """Evict until ``size`` bytes fit: idle parts first, then, for a recall, guessed ones."""
        if size > self.capacity:
            return False
        while self._counts.bytes + size > self.capacity:
            handle = self._policy.victim(lambda handle: not (self._ready[handle].leases or self._ready[handle].guesses))
            if handle is None and not guess:
                handle = self._policy.victim(lambda handle: not self._ready[handle].leases)
            if handle is None:
                return False
            entry = self._ready[handle]
            self._count(evicted=1)
            self._remove(entry)
        return True

    def _remove(self, entry: Entry) -> None:
        """Let nobody find an entry any more. Who leases it may go on reading."""
        self._removed.add(entry)
        if self._entries.get((entry.id, entry.dtype)) is entry:
            del self._entries[entry.id, entry.dtype]
        if self._ready.pop(entry.handle, None) is not None:
            self._policy.removed(entry.handle)
            self._count(wasted_bytes=0 if entry.is_used else entry.size)
        entry.state = "gone"
        self._reclaim(entry)

    def _reclaim(self, entry: Entry) -> None:
        """Let go of a removed part and its bytes, once no recall leases it."""
        if entry.state != "gone":
            return
        if not entry.leases and entry.size:
            self._count(bytes=-entry.size)
            entry.size, entry.loaded = 0, None
        if not (entry.leases or entry.guesses):
            self._removed.discard(entry)
