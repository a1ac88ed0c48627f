"""`Hierarchy`: the tiers in order, fastest first, the home last."""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m3runtime.abilities import Persistent, Scored, Scores
from m3runtime.block import BlockStamp, Found, Ids, check
from m3runtime.errors import BankFullError, BlockError, TierClosedError, TierError, TierReadOnlyError
from m3runtime.slab import finish, runs
from m3runtime.tier import CachingTier, Home, check_rows

LIFT_BLOCKS = 32
"""How many blocks `Hierarchy.lift` moves at a time: what its scratch buffer holds."""


@dataclass(frozen=True, slots=True)
class TierStats:
    """What one tier did in a hierarchy. Each count only grows."""

    name: str
    hits: int = 0
    """Blocks that `Hierarchy.read` got from this tier."""
    misses: int = 0
    bytes: int = 0
    """Bytes of the slots that were found."""
    lifted: int = 0
    """Blocks that `Hierarchy.lift` got from this tier."""
    faults: int = 0
    """Calls that ended in a `TierError`; the next tier answered."""
    bad_blocks: int = 0
    """Blocks that failed their check."""


class Recorder(Protocol):
    """Is told what a hierarchy is asked for, before it does it. Called from any thread."""

    def record(self, op: str, ids: Ids, scores: Scores | None = None) -> None:
        """``op`` is ``read``, ``lift``, ``score``, ``pin``, ``unpin`` or ``discard``."""


class _Cache:
    """A caching tier, and what the hierarchy knows of it."""

    def __init__(self, tier: CachingTier) -> None:
        self.tier = tier
        self.pinned: set[int] = set()
        # Forgotten ids that it failed to discard. Until it does, it is asked for nothing.
        self.owed: set[int] = set()


class Hierarchy:
    """Reads blocks through caching tiers and a home, and keeps what is used in the faster ones.

    ``device`` is where blocks are decoded and where `read` fills buffers. A block from a tier that can rot
    is checked against ``stamp``, its id and its digest; a bad one is never handed out. A caching tier that
    fails is counted and the next tier answers; what the home raises is raised. Thread-safe. It closes the
    caching tiers, while the home belongs to the bank.
    """

    def __init__(
        self,
        tiers: Sequence[CachingTier],
        home: Home,
        stamp: BlockStamp,
        device: torch.device | str = "cpu",
        recorder: Recorder | None = None,
    ) -> None:
        self.home = home
        self.stamp = stamp
        self.device = torch.device(device)
        self.slot_bytes = home.slot_bytes
        self._caches = [_Cache(tier) for tier in tiers]
        self._stats = [TierStats(tier.name) for tier in (*tiers, home)]
        self._counting = threading.Lock()
        self._pinning = threading.Lock()
        self._pins: Counter[int] = Counter()
        # What enters a caching tier, against what is forgotten meanwhile: see `_promote` and `discard`.
        self._promoting = threading.RLock()
        self._forgets = 0
        self._closed = False
        self._recorder = recorder
        for cache in self._caches:
            if isinstance(cache.tier, Persistent):
                cache.owed.update(np.setdiff1d(cache.tier.ids(), home.ids()).tolist())

    def read(self, ids: Ids, out: Tensor) -> Found:
        """Fill rows of ``out`` from the fastest tier that has each block.

        ``out`` is ``uint8[n, slot_bytes]`` on any device; an id may occur twice. Rows that are not found
        have no meaning afterwards. What was found is kept in every faster tier.
        """
        self._record("read", ids)
        return self._read(ids, out, lifting=False)

    def lift(self, ids: Ids) -> Found:
        """Bring blocks up to the fastest caching tier with room. Returns which any of them holds then."""
        self._open()
        ids = np.asarray(ids)
        self._record("lift", ids)
        target = next((cache for cache in self._caches if cache.tier.capacity), None)
        if target is not None:
            wanted = np.unique(ids)
            wanted = wanted[~self._held(target, wanted)]
            for start in range(0, len(wanted), LIFT_BLOCKS):
                some = wanted[start : start + LIFT_BLOCKS]
                self._read(some, self._buffer(len(some), self.device), lifting=True)
        return self.held(ids)

    def score(self, ids: Ids, scores: Scores) -> None:
        """Tell the caching tiers what retrieval thought of these, for policies that look at it."""
        self._open()
        self._record("score", ids, scores)
        for level, cache in enumerate(self._caches):
            if isinstance(cache.tier, Scored):
                try:
                    cache.tier.score(ids, scores)
                except TierError:
                    self._count(level, faults=1)

    def held(self, ids: Ids) -> Found:
        """Which of these a caching tier holds now, so that reading them does not touch the home."""
        held = np.zeros(len(ids), np.bool_)
        for cache in self._caches:
            held |= self._held(cache, ids)
        return held

    def pin(self, ids: Ids) -> Found:
        """Keep these in the caching tiers that hold them, until as many `unpin`. Returns which are held."""
        self._open()
        self._record("pin", ids)
        with self._pinning:
            self._pins.update(ids.tolist())
            for level, cache in enumerate(self._caches):
                new = np.array(sorted(set(ids.tolist()) - cache.pinned), np.uint64)
                try:
                    cache.pinned.update(new[cache.tier.pin(new)].tolist())
                except TierError:
                    self._count(level, faults=1)
            return np.array([any(id in cache.pinned for cache in self._caches) for id in ids.tolist()], np.bool_)

    def unpin(self, ids: Ids) -> None:
        """Take back one `pin` of each id that had one, whether or not a tier held it."""
        self._open()
        self._record("unpin", ids)
        with self._pinning:
            self._pins.subtract(id for id in ids.tolist() if id in self._pins)
            free = {id for id in ids.tolist() if self._pins[id] <= 0}
            for id in free:
                del self._pins[id]
            self._release(free, discarded=False)

    def discard(self, ids: Ids) -> None:
        """Forget blocks, in the home first. Once it returned no tier will ever answer with them."""
        self._open()
        self._record("discard", ids)
        self.home.discard(ids)
        with self._promoting:
            self._forgets += 1
            for level, cache in enumerate(self._caches):
                cache.owed.update(ids.tolist())
                self._settle(level, cache)
        with self._pinning:
            for id in ids.tolist():
                self._pins.pop(id, None)
            self._release(set(ids.tolist()), discarded=True)

    def stats(self) -> tuple[TierStats, ...]:
        """A snapshot for each tier, the home's last."""
        with self._counting:
            return tuple(self._stats)

    def close(self) -> None:
        """Close the caching tiers. Closing twice is fine."""
        self._closed = True
        for cache in self._caches:
            cache.tier.close()

    def _record(self, op: str, ids: Ids, scores: Scores | None = None) -> None:
        if self._recorder is not None:
            self._recorder.record(op, ids, scores)

    def _open(self) -> None:
        if self._closed:
            raise TierClosedError("the hierarchy is closed")

    def _read(self, ids: Ids, out: Tensor, *, lifting: bool) -> Found:
        self._open()
        check_rows(ids, out, self.slot_bytes)
        forgets = self._forgets
        found = np.zeros(len(ids), np.bool_)
        for level in range(len(self._caches) + 1):
            if not found.all():
                found |= self._read_level(level, ids, ~found, out, forgets, lifting)
        return found

    def _read_level(self, level: int, ids: Ids, missing: Found, out: Tensor, forgets: int, lifting: bool) -> Found:
        """Read the missing rows from one tier, and give what it had to all faster ones."""
        rows = np.flatnonzero(missing)
        cache = self._caches[level] if level < len(self._caches) else None
        tier = self.home if cache is None else cache.tier
        checked = cache is None or cache.tier.can_rot
        if cache is not None and not self._settle(level, cache):
            return np.zeros_like(missing)
        # One copy where the missing rows lie side by side and the CPU, which checks digests, can see them.
        direct = rows[-1] - rows[0] + 1 == len(rows) and not (checked and out.device.type != "cpu")
        buffer = (
            out[rows[0] : rows[-1] + 1]
            if direct
            else self._buffer(len(rows), torch.device("cpu") if checked else out.device)
        )
        try:
            got = tier.read(ids[rows], buffer)
        except TierError:
            if cache is None:
                raise
            self._count(level, faults=1)
            return np.zeros_like(missing)
        if checked:
            got = self._checked(level, ids[rows], buffer, got)
        hits = int(got.sum())
        if lifting:
            self._count(level, lifted=hits)
        else:
            self._count(level, hits=hits, misses=len(rows) - hits, bytes=hits * self.slot_bytes)
        found = np.zeros_like(missing)
        found[rows[got]] = True
        if not direct:
            for start, end, source in _ranges(found, rows):
                out[start:end].copy_(buffer[source : source + end - start], non_blocking=True)
            finish(out.device)
        if level and hits:
            self._promote(level, ids, found, rows, out, buffer, forgets)
        return found

    def _promote(
        self,
        level: int,
        ids: Ids,
        found: Found,
        rows: npt.NDArray[np.intp],
        out: Tensor,
        buffer: Tensor,
        forgets: int,
    ) -> None:
        """Give what ``level`` had to the faster tiers, but nothing that was forgotten since it was read."""
        with self._promoting:
            if self._forgets != forgets:
                found = found & self.home.contains(ids)
            for faster, cache in enumerate(self._caches[:level]):
                if not self._settle(faster, cache):
                    continue
                try:
                    for start, end, source in _ranges(found, rows):
                        # What crossed to the device already does not cross again.
                        here = cache.tier.device == out.device
                        blocks = out[start:end] if here else buffer[source : source + end - start]
                        cache.tier.write(ids[start:end], blocks)
                except TierError:
                    self._count(faster, faults=1)

    def _checked(self, level: int, ids: Ids, blocks: Tensor, got: Found) -> Found:
        """``got`` without the blocks that are not what they should be, which are set apart."""
        got, rows = got.copy(), blocks.numpy()
        for row in np.flatnonzero(got).tolist():
            id = int(ids[row])
            try:
                check(rows[row], id=id, stamp=self.stamp)
            except BlockError as error:
                got[row] = False
                self._count(level, bad_blocks=1)
                self._set_apart(level, id, str(error))
        return got

    def _set_apart(self, level: int, id: int, reason: str) -> None:
        if level == len(self._caches):
            try:
                self.home.quarantine(id, reason)
            except (TierReadOnlyError, BankFullError):
                return  # it stays a miss: every reading of it is checked again
        else:
            with self._promoting:
                self._caches[level].owed.add(id)
                self._settle(level, self._caches[level])
            with self._pinning:
                self._caches[level].pinned.discard(id)

    def _settle(self, level: int, cache: _Cache) -> bool:
        """Whether the tier can be used: it discarded all that it should have."""
        if cache.owed:
            with self._promoting:
                try:
                    cache.tier.discard(np.array(sorted(cache.owed), np.uint64))
                    cache.owed.clear()
                except TierError:
                    self._count(level, faults=1)
                    return False
        return True

    def _release(self, ids: set[int], *, discarded: bool) -> None:
        for level, cache in enumerate(self._caches):
            ours = cache.pinned & ids
            cache.pinned -= ours
            if ours and not discarded:
                try:
                    cache.tier.unpin(np.array(sorted(ours), np.uint64))
                except TierError:
                    self._count(level, faults=1)

    def _held(self, cache: _Cache, ids: Ids) -> Found:
        try:
            return cache.tier.contains(ids)
        except TierError:
            self._count(self._caches.index(cache), faults=1)
            return np.zeros(len(ids), np.bool_)

    def _buffer(self, count: int, device: torch.device) -> Tensor:
        locked = device.type == "cpu" and torch.cuda.is_available()
        return torch.empty((count, self.slot_bytes), dtype=torch.uint8, device=device, pin_memory=locked)

    def _count(self, level: int, **more: int) -> None:
        with self._counting:
            stats = self._stats[level]
            self._stats[level] = replace(stats, **{key: getattr(stats, key) + by for key, by in more.items()})


def _ranges(found: Found, rows: npt.NDArray[np.intp]) -> Iterator[tuple[int, int, int]]:
    """Ranges of rows that were found, and where each begins among the rows that were read."""
    for start, end in runs(found):
        yield start, end, int(np.searchsorted(rows, start))
