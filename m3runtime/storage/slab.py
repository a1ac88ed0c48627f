"""`SlabTier`: a caching tier that is one slab of equal slots. And the copying of rows that tiers share."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m3runtime.errors import ConfigError, TierClosedError, TierError
from m3runtime.memory.block import Found, Ids
from m3runtime.storage.abilities import Scores
from m3runtime.storage.eviction import ScoreAware, make_policy
from m3runtime.storage.tier import CachingTier, check_rows

Slots = npt.NDArray[np.int64]


def runs(mask: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """Maximal ranges ``[start, end)`` of true: such rows are a view, copied without a temporary."""
    edges = np.flatnonzero(np.diff(mask, prepend=False, append=False))
    yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


def gather(slab: Tensor, slots: Slots, out: Tensor) -> None:
    """``out[i] = slab[slots[i]]`` with one copy of each row, between any two devices."""
    if slab.device != out.device:
        for row, slot in enumerate(slots.tolist()):
            out[row].copy_(slab[slot], non_blocking=True)
    elif slab.device.type == "cpu":  # mode="raise" would copy through a buffer
        np.take(slab.numpy(), slots, axis=0, out=out.numpy(), mode="clip")
    else:
        torch.index_select(slab, 0, torch.from_numpy(slots).to(slab.device), out=out)


def scatter(slab: Tensor, slots: Slots, blocks: Tensor) -> None:
    """``slab[slots[i]] = blocks[i]``, slots distinct, with one copy of each row, between any devices."""
    if slab.device != blocks.device:
        for row, slot in enumerate(slots.tolist()):
            slab[slot].copy_(blocks[row], non_blocking=True)
    elif slab.device.type == "cpu":  # torch.index_copy_ goes byte by byte here
        slab.numpy()[slots] = blocks.numpy()
    else:
        slab.index_copy_(0, torch.from_numpy(slots).to(slab.device), blocks)


def finish(*devices: torch.device) -> None:
    """Wait for the copies that were queued on the current streams of these devices."""
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.current_stream(device).synchronize()


@dataclass(frozen=True, slots=True)
class SlabStats:
    """What a slab did since it was made. Blocks that `read` found and missed, and how many made room."""

    hits: int
    misses: int
    evictions: int


class SlabTier(CachingTier):
    """Blocks in one preallocated ``uint8[slots, slot_bytes]`` tensor, so that the capacity in bytes is exact.

    ``capacity`` bytes hold ``capacity // slot_bytes`` blocks; with room for none, none is ever admitted.
    One lock covers every method, the copies included: no slot is filled again while it is being read.
    Raises `ConfigError` if the device is not there or has not enough memory.
    """

    def __init__(
        self,
        *,
        name: str,
        slot_bytes: int,
        capacity: int,
        eviction: str,
        device: torch.device,
        page_locked: bool = False,
    ) -> None:
        if slot_bytes < 1 or capacity < 0:
            raise ConfigError(f"tier {name}: slot_bytes must be positive and capacity not negative")
        self.name = name
        self.slot_bytes = slot_bytes
        self.device = device
        slots = capacity // slot_bytes
        self._policy = make_policy(eviction, slots)
        try:
            # Streams write to the slab outside of inference mode too, where inference tensors are read-only.
            with torch.inference_mode(False):
                self._slab: Tensor | None = torch.empty(
                    (slots, slot_bytes), dtype=torch.uint8, device=device, pin_memory=page_locked
                )
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            reason = str(error).splitlines()[0]
            raise ConfigError(f"tier {name}: no {slots * slot_bytes} bytes on {device}: {reason}") from error
        self._slots = slots
        self._held: dict[int, int] = {}
        self._free = list(range(slots - 1, -1, -1))
        self._hits = self._misses = self._evictions = 0
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """Bytes of blocks held at most: whole slots."""
        return self._slots * self.slot_bytes

    def read(self, ids: Ids, out: Tensor) -> Found:
        """See `Tier.read`. The copies are finished when it returns."""
        check_rows(ids, out, self.slot_bytes)
        with self._lock:
            slab = self._open()
            slots = np.array([self._held.get(id, -1) for id in ids.tolist()], np.int64)
            found: Found = slots >= 0
            try:
                for start, end in runs(found):
                    gather(slab, slots[start:end], out[start:end])
                finish(slab.device, out.device)
            except RuntimeError as error:  # from the device
                raise TierError(f"tier {self.name}: {str(error).splitlines()[0]}") from error
            for id in ids[found].tolist():
                self._policy.touched(id)
            self._hits += (hits := int(found.sum()))
            self._misses += len(ids) - hits
            return found

    def write(self, ids: Ids, blocks: Tensor) -> None:
        """See `Tier.write`. Blocks that are held already are passed over."""
        check_rows(ids, blocks, self.slot_bytes)
        with self._lock:
            slab = self._open()
            # A batch larger than the slab evicts its own first blocks: a slot takes the last row assigned
            # to it.
            row_of: dict[int, int] = {}
            are_filled = False
            try:
                for row, id in enumerate(ids.tolist()):
                    if id not in self._held and (slot := self._claim()) is not None:
                        row_of[slot] = row
                        self._held[id] = slot
                        self._policy.admitted(id)
                slots = np.full(len(ids), -1, np.int64)
                slots[list(row_of.values())] = list(row_of)
                for start, end in runs(slots >= 0):
                    scatter(slab, slots[start:end], blocks[start:end])
                finish(slab.device, blocks.device)
                are_filled = True
            except RuntimeError as error:  # from the device
                raise TierError(f"tier {self.name}: {str(error).splitlines()[0]}") from error
            finally:  # whatever ended it, Ctrl-C included: what these slots hold is not known
                if not are_filled:
                    for slot, row in row_of.items():
                        if self._held.get(id := int(ids[row])) == slot:
                            self._remove(id)

    def discard(self, ids: Ids) -> None:
        """See `Tier.discard`."""
        with self._lock:
            self._open()
            for id in ids.tolist():
                if id in self._held:
                    self._remove(id)

    def contains(self, ids: Ids) -> Found:
        """See `Tier.contains`."""
        with self._lock:
            self._open()
            return np.array([id in self._held for id in ids.tolist()], np.bool_)

    def score(self, ids: Ids, scores: Scores) -> None:
        """See `m3runtime.storage.abilities.Scored`. For policies that are `ScoreAware`; others pass it over."""
        with self._lock:
            self._open()
            if isinstance(self._policy, ScoreAware):
                for id, score in zip(ids.tolist(), scores.tolist(), strict=True):
                    if id in self._held:
                        self._policy.scored(id, score)

    def stats(self) -> SlabStats:
        """A snapshot; also of a closed tier."""
        with self._lock:
            return SlabStats(self._hits, self._misses, self._evictions)

    def close(self) -> None:
        """See `Tier.close`."""
        with self._lock:
            self._slab = None
            self._held.clear()

    def __len__(self) -> int:
        with self._lock:
            self._open()
            return len(self._held)

    def _open(self) -> Tensor:
        if self._slab is None:
            raise TierClosedError(f"tier {self.name} is closed")
        return self._slab

    def _claim(self) -> int | None:
        if self._free:
            return self._free.pop()
        victim = self._policy.victim()
        if victim is None:
            return None
        self._evictions += 1
        self._remove(victim)
        return self._free.pop()

    def _remove(self, id: int) -> None:
        self._free.append(self._held.pop(id))
        self._policy.removed(id)
