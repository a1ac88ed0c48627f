"""`SlabTier`: a caching tier that is one slab of equal slots."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from m3runtime.device.copies import Copies, copy_rows
from m3runtime.device.page_locked import PageLocked
from m3runtime.errors import ConfigError, TierClosedError, TierError
from m3runtime.memory.block import Found, Ids
from m3runtime.storage.eviction import make_policy
from m3runtime.storage.tier import CachingTier, Scores, check_rows


class SlabTier(CachingTier):
    """Blocks in one preallocated ``uint8[slots, slot_bytes]`` tensor, so that the capacity in bytes is exact.

    ``capacity`` bytes hold ``capacity // slot_bytes`` blocks; with room for none, none is ever admitted. A slab in RAM
    is page-locked for ``locked_for``, a CUDA device. Raises `ConfigError` if the device does not have the memory.

    One lock covers the table and the queueing of copies. The CPU never waits for a device under it: copies on an
    accelerator are ordered by events, in the current stream of the thread that calls. A thread whose stream has much
    work queued therefore delays nobody else.
    """

    def __init__(
        self,
        *,
        name: str,
        slot_bytes: int,
        capacity: int,
        eviction: str,
        device: torch.device,
        locked_for: torch.device | None = None,
    ) -> None:
        if slot_bytes < 1 or capacity < 0:
            raise ConfigError(f"tier {name}: slot_bytes must be positive and capacity not negative")
        self.name = name
        self.slot_bytes = slot_bytes
        self.device = device
        self._slots = capacity // slot_bytes
        self._policy = make_policy(eviction, self._slots)
        self._locked: PageLocked | None = None
        try:
            self._slab: Tensor | None = self._allocate(locked_for)
        except (RuntimeError, OSError) as error:  # torch.OutOfMemoryError is one
            size, reason = self._slots * slot_bytes, str(error).splitlines()[0]
            where = "on" if locked_for is None else "to lock on"
            raise ConfigError(f"tier {name}: no {size} bytes {where} {device}: {reason}") from error
        self._copies = Copies()
        self._held: dict[int, int] = {}
        self._free = list(range(self._slots - 1, -1, -1))
        self._lock = threading.Lock()

    @property
    def capacity(self) -> int:
        """The most bytes of blocks held: whole slots."""
        return self._slots * self.slot_bytes

    def read(self, ids: Ids, out: Tensor) -> Found:
        """Copy held blocks into ``out``; see `Tier.read`. Rows in RAM are filled when it returns.

        A slab on an accelerator is read into RAM through a buffer on the device.
        """
        check_rows(ids, out, self.slot_bytes)
        with self._device_errors():
            is_direct = self.device.type == "cpu" or out.device == self.device
            rows_out = out if is_direct else torch.empty(out.shape, dtype=out.dtype, device=self.device)
        with self._lock:
            slab = self._open()
            slots = np.array([self._held.get(id, -1) for id in ids.tolist()], np.int64)
            found: Found = slots >= 0
            rows, taken = np.flatnonzero(found).tolist(), slots[found].tolist()
            with self._device_errors():
                stream = self._stream(rows_out)
                if stream is not None:
                    self._copies.before_read(taken, stream)
                copy_rows(rows_out, rows, slab, taken)
                if stream is not None and taken:
                    self._copies.read(taken, stream.record_event())
            for id in ids[found].tolist():
                self._policy.touched(id)
        if not is_direct:
            with self._device_errors():
                for row in rows:
                    out[row].copy_(rows_out[row])
        return found

    def write(self, ids: Ids, blocks: Tensor) -> None:
        """Hold these blocks; see `Tier.write`. Blocks that are held already are ignored.

        Blocks on another device are first copied to the slab's, whole. On an accelerator the slots are filled in the
        order of its current stream. No block is admitted where every slot is being read by another device.
        """
        check_rows(ids, blocks, self.slot_bytes)
        with self._device_errors():
            blocks = blocks.to(self.device)
        with self._lock:
            slab = self._open()
            # A batch larger than the slab evicts its own first blocks: a slot takes the last row assigned to it.
            row_of: dict[int, int] = {}
            are_filled = False
            try:
                for row, id in enumerate(ids.tolist()):
                    if id not in self._held and (slot := self._claim()) is not None:
                        row_of[slot] = row
                        self._held[id] = slot
                        self._policy.admitted(id)
                with self._device_errors():
                    stream = self._stream(slab)
                    if stream is not None:
                        self._copies.before_write(row_of, stream)
                    copy_rows(slab, list(row_of), blocks, list(row_of.values()))
                    if stream is not None and row_of:
                        self._copies.filled(row_of, stream.record_event())
                are_filled = True
            finally:  # whatever ended it, Ctrl-C included: what these slots hold is not known
                if not are_filled:
                    for slot, row in row_of.items():
                        if self._held.get(id := int(ids[row])) == slot:
                            self._remove(id)

    def discard(self, ids: Ids) -> None:
        """Drop these blocks; see `Tier.discard`."""
        with self._lock:
            self._open()
            for id in ids.tolist():
                if id in self._held:
                    self._remove(id)

    def contains(self, ids: Ids) -> Found:
        """The ids that are held; see `Tier.contains`."""
        with self._lock:
            self._open()
            return np.array([id in self._held for id in ids.tolist()], np.bool_)

    def score(self, ids: Ids, scores: Scores) -> None:
        """Pass scores to the eviction policy; see `CachingTier.score`."""
        with self._lock:
            self._open()
            for id, score in zip(ids.tolist(), scores.tolist(), strict=True):
                if id in self._held:
                    self._policy.scored(id, score)

    def close(self) -> None:
        """Release the slab once the copies from and to it have ended; see `Tier.close`."""
        with self._lock:
            self._slab = None
            self._held.clear()
        self._copies.finish()  # nobody adds any more
        if self._locked is not None:
            self._locked.close()
            self._locked = None

    def __len__(self) -> int:
        with self._lock:
            self._open()
            return len(self._held)

    def _allocate(self, locked_for: torch.device | None) -> Tensor:
        if locked_for is not None:
            self._locked = PageLocked(self._slots * self.slot_bytes, locked_for)
            return self._locked.bytes.view(self._slots, self.slot_bytes)
        # Streams write to the slab outside of inference mode too, where inference tensors are read-only.
        with torch.inference_mode(False):
            return torch.empty((self._slots, self.slot_bytes), dtype=torch.uint8, device=self.device)

    def _open(self) -> Tensor:
        if self._slab is None:
            raise TierClosedError(f"tier {self.name} is closed")
        return self._slab

    def _stream(self, rows: Tensor) -> torch.Stream | None:
        """The stream that copies between the slab and these rows are queued on; None if both are in RAM."""
        return None if rows.device.type == "cpu" else torch.accelerator.current_stream(rows.device)

    def _claim(self) -> int | None:
        """A slot that may be filled: a free one, or that of an evicted block."""
        if not self._free:
            victim = self._policy.victim(lambda id: self._may_fill(self._held[id]))
            if victim is None:
                return None
            self._remove(victim)
        place = next((place for place, slot in enumerate(reversed(self._free)) if self._may_fill(slot)), None)
        return None if place is None else self._free.pop(-1 - place)

    def _may_fill(self, slot: int) -> bool:
        # On an accelerator the copy into the slot waits for those out of it. The CPU would have to wait here.
        return self.device.type != "cpu" or self._copies.is_idle(slot)

    def _remove(self, id: int) -> None:
        self._free.append(self._held.pop(id))
        self._policy.removed(id)

    @contextmanager
    def _device_errors(self) -> Iterator[None]:
        """Errors of a device are errors of the tier."""
        try:
            yield
        except RuntimeError as error:
            raise TierError(f"tier {self.name}: {str(error).splitlines()[0]}") from error
