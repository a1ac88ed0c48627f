"""`Hierarchy`: the tiers in order, fastest first, the home last."""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m3runtime.errors import TierClosedError
from m3runtime.memory.block import HEADER_BYTES, Found, Ids, Stamps, headers
from m3runtime.observe.counts import TierStats
from m3runtime.observe.latency import Latency
from m3runtime.storage.checked_cache import CheckedCache
from m3runtime.storage.checked_home import CheckedHome
from m3runtime.storage.checked_tier import CheckedTier
from m3runtime.storage.home import Home
from m3runtime.storage.tier import CachingTier, Scores, Tier, check_rows

LIFT_BLOCKS = 32
"""Blocks that `Hierarchy.lift` moves at a time: its scratch buffer holds them."""


Record = Callable[[str, Ids, Scores | None], None]
"""Called with ``read``, ``lift``, ``score`` or ``discard`` before that call takes effect, from any thread. The scores
are None except of ``score``. It must not block for long."""


class Hierarchy:
    """Reads blocks through caching tiers and a home, and keeps what is used in the faster ones. Thread-safe.

    ``device`` is where blocks are decoded and where `read` fills buffers. A block from the home, or from a tier that
    can rot or outlives the process, is checked against ``stamp``, its id and its digest; a bad one is never handed
    out. A bad copy in a caching tier is discarded, and the next tier answers. For the home see `CheckedHome`.

    Slots of the caching tiers may be smaller than those of the home: they hold the blocks that fit, and longer ones are
    read from the home each time.

    A caching tier that fails is counted, and the next tier answers; what it could not do is owed, and done when it is
    whole again (see `CheckedCache`). What the home raises is raised, except where only keeping a copy, or quarantining,
    would have needed it. The hierarchy closes the caching tiers, while the home belongs to the bank.
    """

    def __init__(
        self,
        tiers: Sequence[CachingTier],
        home: Home,
        stamp: Stamps,
        device: torch.device | str = "cpu",
        record: Record | None = None,
    ) -> None:
        self.home = home
        self.stamp = stamp
        self.device = torch.device(device)
        self.slot_bytes = home.slot_bytes
        # What enters or leaves a caching tier is decided under this lock: what is forgotten while it is read does not
        # come back (see `_promote`).
        self._changing = threading.RLock()
        self._forgets = 0
        self._home = CheckedHome(home, stamp)
        self._short = min((tier.slot_bytes for tier in tiers), default=home.slot_bytes)
        self._caches = [CheckedCache(tier, stamp, self._home.remembered, self._changing) for tier in tiers]
        self._levels: list[CheckedTier] = [*self._caches, self._home]
        self._closed = False
        self._record = record or (lambda *_: None)
        for cache in self._caches:
            cache.is_usable()  # takes what outlived the last process; a tier that fails is asked again later

    def read(self, ids: Ids, out: Tensor) -> Found:
        """Fill rows of ``out`` from the fastest tier that has each block, and keep them in every faster one.

        ``out`` is ``uint8[n, slot_bytes]`` on any device; an id may occur twice. Rows on an accelerator are filled in
        the order of its current stream. Rows that are not found have no meaning afterwards. Raises what the home
        raises, and `TierClosedError`.
        """
        self._record("read", ids, None)
        return self._read(ids, out, lifting=False)

    def lift(self, ids: Ids) -> Found:
        """Copy blocks up to the fastest caching tier with room. Returns as `held` does."""
        self._open()
        ids = np.asarray(ids)
        self._record("lift", ids, None)
        target = self._target
        if target is not None:
            wanted = np.unique(ids)
            wanted = wanted[~target.contains(wanted)]
            for start in range(0, len(wanted), LIFT_BLOCKS):
                some = wanted[start : start + LIFT_BLOCKS]
                self._read(some, self._buffer(len(some), self.device, self.slot_bytes), lifting=True)
        return self.held(ids)

    def score(self, ids: Ids, scores: Scores) -> None:
        """Pass retrieval scores to the caching tiers, for policies that look at them."""
        self._open()
        self._record("score", ids, scores)
        for cache in self._caches:
            cache.score(ids, scores)

    def held(self, ids: Ids) -> Found:
        """``bool[n]``: the ids that a caching tier holds now, so that reading them does not touch the home."""
        self._open()
        held = np.zeros(len(ids), np.bool_)
        for cache in self._caches:
            held |= cache.contains(ids)
        return held

    def near(self, ids: Ids) -> Found:
        """``bool[n]``: the ids that the fastest caching tier with room holds now. `lift` copies blocks to it."""
        self._open()
        target = self._target
        return np.zeros(len(ids), np.bool_) if target is None else target.contains(ids)

    def discard(self, ids: Ids) -> None:
        """Forget blocks, in the home first. Once this returned, no tier ever answers with them."""
        self._open()
        self._record("discard", ids, None)
        self._home.discard(ids)
        self._forget(set(ids.tolist()))

    def forget(self, ids: Iterable[int]) -> None:
        """Drop blocks that another process forgot in the home from the caching tiers."""
        self._open()
        self._forget(set(ids))

    def set_apart(self, id: int, reason: str) -> None:
        """Quarantine a block that is bad though its digest is right, and hold it in no caching tier."""
        self._open()
        self._home.quarantine(id, reason)
        self._forget({id})

    def stats(self) -> tuple[TierStats, ...]:
        """A snapshot of each tier, the home's last."""
        return tuple(level.stats for level in self._levels)

    def latencies(self) -> tuple[Latency, ...]:
        """The durations of the calls that read from each tier, the home's last. A snapshot."""
        return tuple(level.reads.latency() for level in self._levels)

    def close(self) -> None:
        """Close the caching tiers, all of them whatever one raises. Closing twice is fine."""
        self._closed = True
        with ExitStack() as closing:
            for cache in reversed(self._caches):
                closing.callback(cache.close)

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The caching tiers, fastest first, and the home."""
        return tuple(level.tier for level in self._levels)

    @property
    def _target(self) -> CheckedCache | None:
        return next((cache for cache in self._caches if cache.tier.capacity != 0), None)

    def _open(self) -> None:
        if self._closed:
            raise TierClosedError("the hierarchy is closed")

    def _forget(self, ids: set[int]) -> None:
        with self._changing:
            self._forgets += 1  # what is reading them must not promote them
            for cache in self._caches:
                cache.forget(ids)

    def _read(self, ids: Ids, out: Tensor, *, lifting: bool) -> Found:
        self._open()
        check_rows(ids, out, self.slot_bytes)
        forgets = self._forgets
        found = np.zeros(len(ids), np.bool_)
        for place, level in enumerate(self._levels):
            if not found.all():
                found |= self._read_level(level, self._caches[:place], ids, ~found, out, forgets, lifting)
        return found

    def _read_level(
        self,
        level: CheckedTier,
        faster: Sequence[CheckedCache],
        ids: Ids,
        missing: Found,
        out: Tensor,
        forgets: int,
        lifting: bool,
    ) -> Found:
        """Read the missing rows from one tier, and give what it had to all faster ones."""
        rows = np.flatnonzero(missing)
        where = torch.device("cpu") if level.is_checked else out.device
        size = level.tier.slot_bytes
        # One copy where the missing rows lie side by side, and where they are checked.
        is_direct = rows[-1] - rows[0] + 1 == len(rows) and where == out.device and size == self.slot_bytes
        buffer = out[rows[0] : rows[-1] + 1] if is_direct else self._buffer(len(rows), where, size)
        found = np.zeros_like(missing)
        got = level.read(ids[rows], buffer, lifting=lifting)
        if got is None or not got.any():
            return found
        found[rows[got]] = True
        if not is_direct:
            # Not waited for: torch gives a page-locked buffer to nobody else before the copies out of it have ended.
            for start, end, source in _ranges(found, rows):
                out[start:end, :size].copy_(buffer[source : source + end - start], non_blocking=True)
        self._promote(faster, ids, self._fitting(found, rows, buffer), rows, out, buffer, forgets)
        return found

    def _fitting(self, found: Found, rows: npt.NDArray[np.intp], buffer: Tensor) -> Found:
        """Those of the found blocks that fit the slots of the caching tiers."""
        if buffer.shape[1] == self._short:
            return found
        ends = HEADER_BYTES + headers(buffer[:, :HEADER_BYTES].cpu().numpy())["payload"].astype(np.int64)
        fitting = found.copy()
        fitting[rows] &= ends <= self._short
        return fitting

    def _promote(
        self,
        faster: Sequence[CheckedCache],
        ids: Ids,
        found: Found,
        rows: npt.NDArray[np.intp],
        out: Tensor,
        buffer: Tensor,
        forgets: int,
    ) -> None:
        """Give what a tier had to the faster ones, but nothing that was forgotten since it was read."""
        with self._changing:
            if self._forgets != forgets:
                remembered = self._home.remembered(ids)
                if remembered is None:
                    return
                found = found & remembered
            for cache in filter(CheckedCache.is_usable, faster):
                # What crossed to the device already does not cross again.
                is_there = cache.caching.device == out.device
                for start, end, source in _ranges(found, rows):
                    blocks = out[start:end] if is_there else buffer[source : source + end - start]
                    if blocks.shape[1] != self._short:
                        blocks = blocks[:, : self._short].contiguous()
                    if not cache.write(ids[start:end], blocks):
                        break

    def _buffer(self, count: int, device: torch.device, size: int) -> Tensor:
        is_locked = device.type == "cpu" and self.device.type == "cuda"
        return torch.empty((count, size), dtype=torch.uint8, device=device, pin_memory=is_locked)


def _ranges(found: Found, rows: npt.NDArray[np.intp]) -> Iterator[tuple[int, int, int]]:
    """Maximal ranges ``[start, end)`` of rows that were found, and where each begins among the rows that were read.

    Such rows are a view, copied without a temporary.
    """
    edges = np.flatnonzero(np.diff(found, prepend=False, append=False))
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        yield start, end, int(np.searchsorted(rows, start))
