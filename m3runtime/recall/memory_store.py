"""`MemoryStore`: the decoded memories of one device, bounded in bytes; the one owner of decoded memory.

An entry passes through these states::

    wanted ──claim──▶ loading ──settle──▶ ready ──evicted, forgotten──▶ gone
       └──────────────── failed, or nobody wants it any more ─────────▶ gone

The store reads and decodes nothing itself: whoever claims an entry loads it and settles it (`m3runtime.recall.loader`).
Everybody else waits for its future. The module needs torch for types alone.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

from m3runtime.documents.reference import Reference
from m3runtime.errors import TierClosedError
from m3runtime.observe.counts import StoreCounts
from m3runtime.recall.lease import Entry, Lease, Leased, Loaded
from m3runtime.storage.eviction import make_policy

if TYPE_CHECKING:
    import torch


class MemoryStore:
    """A cache of parts by id and dtype, of at most ``capacity`` bytes.

    Leased, guessed, loading and idle parts count alike. A part without leases stays until the eviction policy names it.
    A recall evicts idle parts first, then guesses. Thread-safe: one lock covers the bookkeeping. Nothing is read,
    decoded or waited for while it is held.

    An interrupt (Ctrl-C) may come at any call, also under the lock. So fields that belong together are assigned in
    lines that call nothing, and the policy may know handles that are gone, never the other way round.
    """

    def __init__(
        self, capacity: int, part_bytes: "Callable[[torch.dtype], int]", *, slots: int, eviction: str = "lru"
    ) -> None:
        """``part_bytes`` gives the most bytes of one part in a dtype; ``slots`` is about how many parts fit.

        Raises `ConfigError` for an unknown ``eviction`` policy (see `m3runtime.storage.eviction`).
        """
        self.capacity = capacity
        self._part_bytes = part_bytes
        self._policy = make_policy(eviction, slots)
        self._lock = threading.Lock()
        self._entries: dict[tuple[int, torch.dtype], Entry] = {}
        self._ready: dict[int, Entry] = {}  # by handle
        self._handles = 0
        self._dropped: deque[Lease] = deque()
        self._closed = False
        self._bytes = self._leased = self._guessed = 0
        self._decoded = self._hits = self._evicted = self._wasted_bytes = 0

    # -- leases ------------------------------------------------------------------------------------------------

    def lease(self, ids: Iterable[int], dtype: "torch.dtype", *, guess: bool = False) -> Leased:
        """Lease these memories, loaded or not.

        A memory that is not in the store is admitted as wanted; the caller sees to it that somebody claims it. A guess
        evicts only idle parts. Raises `TierClosedError` after `close`.
        """
        leases: list[Lease] = []
        new: list[int] = []
        with self._lock:
            if self._closed:
                raise TierClosedError("the memory store is closed")
            self._collect_dropped()
            for id in ids:  # held ones first: making room for another must not evict them
                if (entry := self._entries.get((id, dtype))) is None:
                    new.append(id)
                    continue
                leases.append(self._add_lease(entry, guess=guess))
                if entry.state == "ready":
                    self._policy.touched(entry.handle)
                    self._hits += not guess
            size = self._part_bytes(dtype)
            for at, id in enumerate(new):
                if not self._make_room(size, guess=guess):
                    return Leased(leases, new[at:], self._loading_guesses())  # all new ones are of one size
                self._handles += 1
                entry = Entry(id, dtype, self._handles)
                leases.append(self._add_lease(entry, guess=guess))
                entry.size = size
                self._bytes += size
                self._entries[id, dtype] = entry
        return Leased(leases, [], [])

    def share(self, leases: Iterable[Lease], *, guess: bool = False) -> list[Lease]:
        """Another lease of each leased entry, for another holder. A guess is none of an entry that is gone."""
        with self._lock:
            return [
                self._add_lease(lease.entry, guess=guess)
                for lease in leases
                if not (guess and lease.entry.state == "gone")
            ]

    def release(self, leases: Iterable[Lease]) -> None:
        """End leases. Releasing one twice is fine. A wanted entry that nobody leases any more is gone."""
        with self._lock:
            for lease in leases:
                if lease.is_live:
                    self._end(lease)

    # -- loading -----------------------------------------------------------------------------------------------

    def claim(self, leases: Iterable[Lease], by: object) -> list[Entry]:
        """The entries that nobody loads yet, now claimed ``by`` the caller: it must `settle` or `fail` each of them."""
        with self._lock:
            wanted = list(dict.fromkeys(lease.entry for lease in leases if lease.entry.state == "wanted"))
            for entry in wanted:
                entry.loader, entry.state = by, "loading"
            return wanted

    def keep_wanted(self, entries: Sequence[Entry]) -> list[Entry]:
        """The claimed entries that somebody still leases; the others are gone and need not be loaded."""
        wanted, unwanted = list[Entry](), list[Entry]()
        with self._lock:
            for entry in entries:
                if entry.leases or entry.guesses:
                    wanted.append(entry)
                else:
                    unwanted.append(entry)
                    self._remove(entry)
        for entry in unwanted:
            entry.done.set_result(None)
        return wanted

    def settle(self, entry: Entry, loaded: Loaded | None) -> None:
        """Hand over the result of loading a claimed entry. None: the memory is not remembered, or its block is bad."""
        with self._lock:
            if loaded is not None:
                size = loaded.nbytes
                self._policy.admitted(entry.handle)
                self._decoded += 1
                self._bytes += size - entry.size
                entry.size, entry.loaded, entry.state = size, loaded, "ready"
                self._ready[entry.handle] = entry
            if loaded is None or not self._is_held(entry):  # forgotten meanwhile
                self._remove(entry)
        entry.done.set_result(None)

    def fail(self, entries: Iterable[Entry], by: object, error: BaseException) -> None:
        """Remove the entries that were claimed ``by`` the caller and not settled. Their waiters get the error."""
        with self._lock:
            mine = [entry for entry in entries if entry.loader is by]
            for entry in mine:
                if entry.state == "loading":
                    self._remove(entry)
        for entry in mine:
            if not entry.done.done():
                entry.done.set_exception(error)

    # -- the end of a memory -----------------------------------------------------------------------------------

    def references(self) -> dict[int, Reference]:
        """The references of all parts that are ready, by id."""
        with self._lock:
            entries = list(self._ready.values())
        return {entry.id: entry.loaded.reference for entry in entries if entry.loaded is not None}

    def forget(self, ids: Iterable[int]) -> None:
        """Remove every part of these memories: no later `lease` finds one, even if its load is under way."""
        if not (forgotten := set(ids)):
            return  # at most recalls, which need not walk over all entries
        with self._lock:
            for key, entry in list(self._entries.items()):
                if entry.id not in forgotten:
                    continue
                if entry.state == "ready":
                    self._remove(entry)
                else:  # its loader settles it
                    del self._entries[key]

    def close(self) -> None:
        """Remove everything. A later `lease` raises; loads under way are settled by their loaders."""
        with self._lock:
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
        with self._lock:
            self._collect_dropped()
            return StoreCounts(
                capacity=self.capacity,
                bytes=self._bytes,
                parts=len(self._ready),
                leased=self._leased,
                guessed=self._guessed,
                decoded=self._decoded,
                hits=self._hits,
                evicted=self._evicted,
                wasted_bytes=self._wasted_bytes,
            )

    def check_integrity(self) -> None:
        """Raise `AssertionError` unless the counters agree with the entries. For tests: it walks over all entries."""
        with self._lock:
            self._collect_dropped()
            held = list(self._entries.values())
            assert all(self._entries[entry.id, entry.dtype] is entry for entry in held)
            assert {entry.handle for entry in held if entry.state == "ready"} == set(self._ready)
            assert len(self._policy) == len(self._ready)
            assert sum(entry.size for entry in held) <= self._bytes <= self.capacity
            assert sum(bool(entry.leases) for entry in held) <= self._leased
            assert sum(bool(entry.guesses) for entry in held) <= self._guessed
            assert all(entry.leases or entry.guesses for entry in held if entry.state == "wanted")

    # -- bookkeeping, under the lock ---------------------------------------------------------------------------

    def _collect_dropped(self) -> None:
        while self._dropped:
            if (lease := self._dropped[0]).is_live:
                self._end(lease)
            self._dropped.popleft()

    def _add_lease(self, entry: Entry, *, guess: bool) -> Lease:
        lease = Lease(entry, self._dropped, is_guess=guess)
        if guess:
            self._guessed += not entry.guesses
            entry.guesses += 1
        else:
            self._leased += not entry.leases
            entry.leases += 1
            entry.is_used = True
        lease.is_live = True
        return lease

    def _end(self, lease: Lease) -> None:
        entry = lease.entry
        if entry.state == "wanted" and entry.leases + entry.guesses == 1:
            self._remove(entry)
            entry.done.cancel()  # nobody waits
        lease.is_live = False
        if lease.is_guess:
            entry.guesses -= 1
            self._guessed -= not entry.guesses
        else:
            entry.leases -= 1
            self._leased -= not entry.leases
        if entry.state == "gone" and not entry.leases:
            self._bytes -= entry.size
            entry.size, entry.loaded = 0, None

    def _make_room(self, size: int, *, guess: bool) -> bool:
        """Evict until ``size`` bytes fit: idle parts first, then, for a recall, guessed ones."""
        if size > self.capacity:
            return False
        while self._bytes + size > self.capacity:
            handle = self._policy.victim(self._is_idle)
            if handle is None and not guess:
                handle = self._policy.victim(self._is_guess)
            if handle is None:
                return False
            if (entry := self._ready.get(handle)) is None:  # an interrupt came before the policy learned of its end
                self._policy.removed(handle)
            else:
                self._evicted += 1
                self._remove(entry)
        return True

    def _loading_guesses(self) -> "list[Future[None]]":
        return [
            entry.done for entry in self._entries.values() if entry.state in ("wanted", "loading") and not entry.leases
        ]

    def _is_idle(self, handle: int) -> bool:
        return (entry := self._ready.get(handle)) is None or not (entry.leases or entry.guesses)

    def _is_guess(self, handle: int) -> bool:
        return not self._ready[handle].leases

    def _is_held(self, entry: Entry) -> bool:
        return self._entries.get((entry.id, entry.dtype)) is entry

    def _remove(self, entry: Entry) -> None:
        """Let nobody find an entry any more. Whoever leases it may go on reading; then its bytes are free."""
        is_held, is_ready, key = self._is_held(entry), entry.state == "ready", (entry.id, entry.dtype)
        if is_held:
            del self._entries[key]
        entry.state = "gone"
        if is_ready:
            del self._ready[entry.handle]
            self._wasted_bytes += 0 if entry.is_used else entry.size
        if not entry.leases:
            self._bytes -= entry.size
            entry.size, entry.loaded = 0, None
        if is_ready:
            self._policy.removed(entry.handle)
