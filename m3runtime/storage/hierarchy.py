"""`Hierarchy`: the tiers in order, fastest first, the home last."""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m3runtime.errors import BankError, BlockError, TierClosedError, TierError, TierReadOnlyError
from m3runtime.memory.block import BlockStamp, Found, Ids, check
from m3runtime.observe.latency import Latency
from m3runtime.observe.tiers import TierStats
from m3runtime.storage.abilities import Scores
from m3runtime.storage.cache import Cache, Tally
from m3runtime.storage.home import Home
from m3runtime.storage.slab import finish, runs
from m3runtime.storage.tier import CachingTier, Tier, check_rows

LIFT_BLOCKS = 32
"""How many blocks `Hierarchy.lift` moves at a time: what its scratch buffer holds."""


class Recorder(Protocol):
    """Is told what a hierarchy is asked for, before it does it. Called from any thread."""

    def record(self, op: str, ids: Ids, scores: Scores | None = None) -> None:
        """``op`` is ``read``, ``lift``, ``score``, ``pin``, ``unpin`` or ``discard``."""


class Hierarchy:
    """Reads blocks through caching tiers and a home, and keeps what is used in the faster ones.

    ``device`` is where blocks are decoded and where `read` fills buffers. A block from the home, or from a tier that
    can rot or outlives the process, is checked against ``stamp``, its id and its digest; a bad one is never handed
    out. A bad copy in a caching tier is discarded there, and the next tier answers. A block of the home that is bad is
    read once more, for the drive or the way from it may have erred; one that is bad twice is quarantined.

    A caching tier that fails is counted, and the next tier answers; what it could not do is owed, and done when it is
    whole again (see `Cache`). What the home raises is raised, except where only keeping a copy, or quarantining,
    would have needed it. Thread-safe. It closes the caching tiers, while the home belongs to the bank.
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
        # What enters, stays in or leaves a caching tier is decided under this lock: what is forgotten while it is
        # read does not come back (see `_promote`), and a pin and a discard of one block never cross.
        self._changing = threading.RLock()
        self._forgets = 0
        self._pins: Counter[int] = Counter()
        self._caches = [Cache(tier, self._remembered, self._changing) for tier in tiers]
        self._tallies = [*(cache.tally for cache in self._caches), Tally(home.name)]
        self._closed = False
        self._recorder = recorder
        for cache in self._caches:
            cache.is_usable()  # takes what outlived the last process; a tier that fails is asked again later

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
        target = self._target
        if target is not None:
            wanted = np.unique(ids)
            wanted = wanted[~target.contains(wanted)]
            for start in range(0, len(wanted), LIFT_BLOCKS):
                some = wanted[start : start + LIFT_BLOCKS]
                self._read(some, self._buffer(len(some), self.device), lifting=True)
        return self.held(ids)

    def score(self, ids: Ids, scores: Scores) -> None:
        """Tell the caching tiers what retrieval thought of these, for policies that look at it."""
        self._open()
        self._record("score", ids, scores)
        for cache in self._caches:
            cache.score(ids, scores)

    def held(self, ids: Ids) -> Found:
        """Which of these a caching tier holds now, so that reading them does not touch the home."""
        self._open()
        held = np.zeros(len(ids), np.bool_)
        for cache in self._caches:
            held |= cache.contains(ids)
        return held

    def near(self, ids: Ids) -> Found:
        """Which of these the fastest caching tier with room holds now: where `lift` brings blocks to."""
        self._open()
        target = self._target
        return np.zeros(len(ids), np.bool_) if target is None else target.contains(ids)

    def pin(self, ids: Ids) -> Found:
        """Keep these in the caching tiers that hold them, until as many `unpin`. Returns which are held."""
        self._open()
        self._record("pin", ids)
        with self._changing:
            self._pins.update(ids.tolist())
            wanted = set(ids.tolist())
            pinned = set[int]().union(*(cache.pin(wanted) for cache in self._caches))
            return np.array([id in pinned for id in ids.tolist()], np.bool_)

    def unpin(self, ids: Ids) -> None:
        """Take back one `pin` of each id that had one, whether or not a tier held it."""
        self._open()
        self._record("unpin", ids)
        with self._changing:
            self._pins.subtract(id for id in ids.tolist() if id in self._pins)
            self._drop_pins({id for id in ids.tolist() if self._pins[id] <= 0})

    def discard(self, ids: Ids) -> None:
        """Forget blocks, in the home first. Once it returned no tier will ever answer with them."""
        self._open()
        self._record("discard", ids)
        try:
            self.home.discard(ids)
        except (TierError, BankError):
            self._tallies[-1].add(faults=1)
            raise
        forgotten = set(ids.tolist())
        with self._changing:
            self._forgets += 1
            for cache in self._caches:
                cache.forget(forgotten)
            self._drop_pins(forgotten)

    def set_apart(self, id: int, reason: str) -> None:
        """Quarantine a block that is bad though its digest is right, and hold it in no caching tier."""
        self._open()
        self._quarantine(id, reason)
        with self._changing:
            self._forgets += 1  # what read it meanwhile must not promote it
            for cache in self._caches:
                cache.forget({id})

    def stats(self) -> tuple[TierStats, ...]:
        """A snapshot of each tier, the home's last."""
        return tuple(tally.stats() for tally in self._tallies)

    def close(self) -> None:
        """Close the caching tiers, all of them whatever one raises. Closing twice is fine."""
        self._closed = True
        with ExitStack() as closing:
            for cache in reversed(self._caches):
                closing.callback(cache.close)

    def latencies(self) -> tuple[Latency, ...]:
        """How long calls that read from each tier took, the home's last. A snapshot."""
        return tuple(tally.reads.latency() for tally in self._tallies)

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """The caching tiers, fastest first, and the home."""
        return (*(cache.tier for cache in self._caches), self.home)

    @property
    def _target(self) -> Cache | None:
        return next((cache for cache in self._caches if cache.tier.capacity), None)

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
        for level in range(len(self._tallies)):
            if not found.all():
                found |= self._read_level(level, ids, ~found, out, forgets, lifting)
        return found

    def _read_level(self, level: int, ids: Ids, missing: Found, out: Tensor, forgets: int, lifting: bool) -> Found:
        """Read the missing rows from one tier, and give what it had to all faster ones."""
        rows = np.flatnonzero(missing)
        checked = level == len(self._caches) or self._caches[level].is_checked
        # One copy where the missing rows lie side by side and the CPU, which checks digests, can see them.
        direct = rows[-1] - rows[0] + 1 == len(rows) and not (checked and out.device.type != "cpu")
        buffer = (
            out[rows[0] : rows[-1] + 1]
            if direct
            else self._buffer(len(rows), torch.device("cpu") if checked else out.device)
        )
        got = None
        began = time.perf_counter()
        try:
            got = self._ask(level, ids[rows], buffer)
        finally:  # also where the home raises
            self._tallies[level].reads.add(time.perf_counter() - began)
            if got is None and not lifting:
                self._tallies[level].add(unanswered=len(rows))
        found = np.zeros_like(missing)
        if got is None:
            return found
        hits = int(got.sum())
        if lifting:
            self._tallies[level].add(lifted=hits)
        else:
            self._tallies[level].add(hits=hits, misses=len(rows) - hits, bytes=hits * self.slot_bytes)
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
        with self._changing:
            if self._forgets != forgets:
                remembered = self._remembered(ids)
                if remembered is None:
                    return
                found = found & remembered
            for cache in self._caches[:level]:
                if cache.is_usable():
                    # What crossed to the device already does not cross again.
                    here = cache.tier.device == out.device
                    for start, end, source in _ranges(found, rows):
                        blocks = out[start:end] if here else buffer[source : source + end - start]
                        if not cache.write(ids[start:end], blocks):
                            break

    def _ask(self, level: int, ids: Ids, blocks: Tensor) -> Found | None:
        """Which of these one tier filled, and filled right. None if it cannot answer; raises what the home raises."""
        if level == len(self._caches):
            return self._ask_home(ids, blocks)
        cache = self._caches[level]
        got = cache.read(ids, blocks)
        if got is not None and cache.is_checked and (bad := self._bad(ids, blocks, got)):
            got = got.copy()
            got[list(bad)] = False
            cache.tally.add(bad_blocks=len(bad))
            with self._changing:
                cache.forget(set(ids[list(bad)].tolist()))
        return got

    def _ask_home(self, ids: Ids, blocks: Tensor) -> Found:
        got = self._read_home(ids, blocks)
        if bad := self._bad(ids, blocks, got):
            got = got.copy()
            rows = np.array(list(bad))
            again = torch.zeros((len(rows), self.slot_bytes), dtype=torch.uint8)
            got[rows] = self._read_home(ids[rows], again)
            bad = {int(rows[row]): reason for row, reason in self._bad(ids[rows], again, got[rows]).items()}
            got[list(bad)] = False
            healed = got[rows]
            blocks[torch.from_numpy(rows[healed])] = again[torch.from_numpy(healed)]
            self._tallies[-1].add(bad_blocks=len(bad), recovered=int(healed.sum()))
            for row, reason in bad.items():
                self._quarantine(int(ids[row]), reason)
        return got

    def _read_home(self, ids: Ids, blocks: Tensor) -> Found:
        try:
            return self.home.read(ids, blocks)
        except (TierError, BankError):
            self._tallies[-1].add(faults=1)
            raise

    def _quarantine(self, id: int, reason: str) -> None:
        try:
            self.home.quarantine(id, reason)
        except TierReadOnlyError:
            return  # it stays a miss: every reading of it is checked again
        except (TierError, BankError):
            self._tallies[-1].add(faults=1)

    def _remembered(self, ids: Ids) -> Found | None:
        """Which of these the home has. None if it cannot say: what needs to know can do without."""
        try:
            return self.home.contains(ids)
        except (TierError, BankError):
            self._tallies[-1].add(faults=1)
            return None

    def _bad(self, ids: Ids, blocks: Tensor, got: Found) -> dict[int, str]:
        """The rows that were found and are not the blocks they should be, and why."""
        bad, rows = dict[int, str](), blocks.numpy()
        for row in np.flatnonzero(got).tolist():
            try:
                check(rows[row], id=int(ids[row]), stamp=self.stamp)
            except BlockError as error:
                bad[row] = str(error)
        return bad

    def _drop_pins(self, ids: set[int]) -> None:
        for id in ids:
            self._pins.pop(id, None)
        for cache in self._caches:
            cache.unpin(ids)

    def _buffer(self, count: int, device: torch.device) -> Tensor:
        locked = device.type == "cpu" and self.device.type == "cuda"
        return torch.empty((count, self.slot_bytes), dtype=torch.uint8, device=device, pin_memory=locked)


def _ranges(found: Found, rows: npt.NDArray[np.intp]) -> Iterator[tuple[int, int, int]]:
    """Ranges of rows that were found, and where each begins among the rows that were read."""
    for start, end in runs(found):
        yield start, end, int(np.searchsorted(rows, start))
