"""Caching tiers with one mistake each, in memory."""

from typing import ClassVar

import numpy as np
from torch import Tensor

from m3backends.slabs import PinnedTier
from m3runtime.device.copies import copy_rows
from m3runtime.errors import TierError
from m3runtime.memory.block import Found, Ids
from m3runtime.storage.tier import CachingTier, check_rows
from m3runtime.testing.slab import SlabTierContract
from tests.testing.broken.suites import make_suites


class CapacityOffByOne(PinnedTier):
    def __init__(self, *, slot_bytes: int, capacity: int) -> None:
        super().__init__(slot_bytes=slot_bytes, capacity=capacity + slot_bytes)

    @property
    def capacity(self) -> int:
        return super().capacity - self.slot_bytes


class AnotherIdsBytesOnceInAThousand(PinnedTier):
    reads = 0

    def read(self, ids: Ids, out: Tensor) -> Found:
        found = super().read(ids, out)
        for row in np.flatnonzero(found).tolist():
            self.reads += 1
            others = [slot for id, slot in self._held.items() if id != ids[row]]
            if self.reads % 1000 == 0 and others and self._slab is not None:
                out[row] = self._slab[others[0]]
        return found


class CopiesOutsideTheLock(PinnedTier):
    def read(self, ids: Ids, out: Tensor) -> Found:
        check_rows(ids, out, self.slot_bytes)
        with self._lock:
            slab = self._open()
            slots = np.array([self._held.get(id, -1) for id in ids.tolist()], np.int64)
            found: Found = slots >= 0
            for id in ids[found].tolist():
                self._policy.touched(id)
        copy_rows(out, np.flatnonzero(found).tolist(), slab, slots[found].tolist())
        return found


class MissesAsErrors(PinnedTier):
    def read(self, ids: Ids, out: Tensor) -> Found:
        found = super().read(ids, out)
        if not found.all():
            raise TierError(f"tier {self.name}: block {ids[~found][0]} is not here")
        return found


class ErrorsAsMisses(PinnedTier):
    def read(self, ids: Ids, out: Tensor) -> Found:
        try:
            return super().read(ids, out)
        except TierError:
            return np.zeros(len(ids), np.bool_)


class TouchesRowsThatItMisses(PinnedTier):
    def read(self, ids: Ids, out: Tensor) -> Found:
        check_rows(ids, out, self.slot_bytes)
        out.zero_()
        return super().read(ids, out)


class KeepsTheCallersBuffer(PinnedTier):
    def __init__(self, *, slot_bytes: int, capacity: int) -> None:
        super().__init__(slot_bytes=slot_bytes, capacity=capacity)
        self.rows: dict[int, Tensor] = {}

    def write(self, ids: Ids, blocks: Tensor) -> None:
        new = ~self.contains(ids)
        super().write(ids, blocks)
        self.rows.update((int(ids[row]), blocks[row]) for row in np.flatnonzero(new).tolist())

    def read(self, ids: Ids, out: Tensor) -> Found:
        found = super().read(ids, out)
        for row in np.flatnonzero(found).tolist():
            out[row] = self.rows.get(int(ids[row]), out[row])
        return found


class SignedIds(PinnedTier):
    def write(self, ids: Ids, blocks: Tensor) -> None:
        check_rows(ids, blocks, self.slot_bytes)
        known = ids.astype(np.int64) >= 0
        super().write(ids[known], blocks[known.tolist()])


class ZeroIsNoId(PinnedTier):
    def contains(self, ids: Ids) -> Found:
        return super().contains(ids) & (ids != 0)


class CountsAnIdTwice(PinnedTier):
    twice = 0

    def write(self, ids: Ids, blocks: Tensor) -> None:
        new = ids[~self.contains(ids)]
        super().write(ids, blocks)
        self.twice += len(new) - len(np.unique(new))

    def __len__(self) -> int:
        return super().__len__() + self.twice


class OverwritesABlock(PinnedTier):
    def write(self, ids: Ids, blocks: Tensor) -> None:
        held = self.contains(ids)
        super().write(ids, blocks)
        for row in np.flatnonzero(held).tolist():
            if self._slab is not None and int(ids[row]) in self._held:
                self._slab[self._held[int(ids[row])]] = blocks[row]


class NoRoomIsAFault(PinnedTier):
    def write(self, ids: Ids, blocks: Tensor) -> None:
        super().write(ids, blocks)
        if len(ids) and not self.contains(ids).any():
            raise TierError(f"tier {self.name}: no room")


class TakesAnyShape(PinnedTier):
    def read(self, ids: Ids, out: Tensor) -> Found:
        if tuple(out.shape) != (len(ids), self.slot_bytes):
            return np.zeros(len(ids), np.bool_)
        return super().read(ids, out)


class ClosesOnlyOnce(PinnedTier):
    def close(self) -> None:
        len(self)
        super().close()


class Slabs(SlabTierContract):
    kind: ClassVar[type[PinnedTier]]

    def make(self, *, slot_bytes: int, capacity: int) -> CachingTier:
        return self.kind(slot_bytes=slot_bytes, capacity=capacity)


BROKEN = PinnedTier.__subclasses__()
globals().update(make_suites(Slabs, __name__, PinnedTier, BROKEN))
