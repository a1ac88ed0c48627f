"""`LmdbCache`: a caching tier on a drive, whose blocks outlive the process."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from m3backends.lmdb.slots import SlotFile
from m3runtime.config.units import Size
from m3runtime.errors import ConfigError, TierClosedError, TierError
from m3runtime.memory.block import Found, Ids
from m3runtime.storage.eviction import make_policy
from m3runtime.storage.tier import CachingTier, Scores, check_rows, read_by_host


class LmdbCache(CachingTier):
    """Blocks in equal slots of one file in the folder ``path``, and in LMDB the table of what the slots hold.

    ``capacity`` bytes hold ``capacity // slot_bytes`` blocks, and the file of blocks is never longer. The table takes
    some 50 bytes for each. Blocks are there again when the folder is opened again; a cache that was damaged, is
    of another ``bank``, or has slots of another size, is begun anew. `discard` erases. See `SlotFile`.

    One process has the cache open. In another one every call raises `TierError`, which a hierarchy counts and goes on
    without the tier, until the first process has closed it. Reads run at the same time; one thread writes.

    Raises `ConfigError` for a folder of something else, and on Windows.
    """

    name = "lmdb-cache"
    can_rot = True
    device = torch.device("cpu")

    def __init__(self, *, slot_bytes: int, capacity: Size, path: Path, eviction: str = "lru", bank: str = "") -> None:
        if not hasattr(os, "preadv"):
            raise ConfigError("tier lmdb-cache needs Linux or macOS")
        self.slot_bytes = slot_bytes
        self.path = Path(path)
        self._bank = bank
        self._slots = capacity // slot_bytes
        self._eviction = eviction
        self._policy = make_policy(eviction, self._slots)
        self._process = os.getpid()
        self._changed = threading.Condition()
        self._file: SlotFile | None = None
        self._held: dict[int, int] = {}
        self._free: list[int] = []
        self._unknown: set[int] = set()  # free slots that may hold bytes of any block, since filling them failed
        self._reading: dict[int, int] = {}
        self._closed = False
        try:
            with self._opened():
                pass
        except TierError:
            return  # asked again at the next call

    @property
    def capacity(self) -> int:
        """The most bytes of blocks held: whole slots."""
        return self._slots * self.slot_bytes

    def ids(self) -> Ids:
        """All ids held; see `Persistent`."""
        with self._opened():
            return np.array(list(self._held), np.uint64)

    def read(self, ids: Ids, out: Tensor) -> Found:
        """Copy held blocks into ``out``; see `Tier.read`. The drive is asked for all of them at once."""
        check_rows(ids, out, self.slot_bytes)
        if out.device.type != "cpu":
            return read_by_host(self, ids, out)
        with self._opened() as file:
            places = [self._held.get(id) for id in ids.tolist()]
            slots = [slot for slot in places if slot is not None]
            for id, slot in zip(ids.tolist(), places, strict=True):
                if slot is not None:
                    self._policy.touched(id)
                    self._reading[slot] = self._reading.get(slot, 0) + 1
        if not slots:
            return np.zeros(len(ids), np.bool_)
        try:
            rows_out = out.numpy()
            file.read(slots, [rows_out[row] for row, slot in enumerate(places) if slot is not None])
        finally:
            with self._changed:
                for slot in slots:
                    self._reading[slot] -= 1
                    if not self._reading[slot]:
                        del self._reading[slot]
                self._changed.notify_all()
        return np.array([slot is not None for slot in places], np.bool_)

    def write(self, ids: Ids, blocks: Tensor) -> None:
        """Hold these blocks; see `Tier.write`. None is admitted where every slot is being read."""
        check_rows(ids, blocks, self.slot_bytes)
        rows = blocks.cpu().numpy()
        with self._opened() as file:
            wanted = dict[int, tuple[int, int]]()
            for row, id in enumerate(ids.tolist()):
                if id not in self._held and (slot := self._claim()) is not None:
                    self._held[id] = slot
                    self._policy.admitted(id)
                    wanted[slot] = (id, row)
            if not wanted:
                return
            try:
                file.fill({slot: (id, np.ascontiguousarray(rows[row])) for slot, (id, row) in wanted.items()})
                self._unknown -= wanted.keys()
            except BaseException:
                self._unknown |= wanted.keys()
                for id, _ in wanted.values():
                    self._free.append(self._remove(id))
                raise

    def discard(self, ids: Ids) -> None:
        """Drop these blocks, and erase them on the drive; see `Tier.discard`."""
        with self._opened():
            wanted = {id: self._held[id] for id in ids.tolist() if id in self._held}
            while not self._reading.keys().isdisjoint(wanted.values()):
                self._changed.wait()
                wanted = {id: self._held[id] for id in ids.tolist() if id in self._held}
            self._open().erase([*wanted.values(), *self._unknown])
            self._unknown.clear()
            for id in wanted:
                self._free.append(self._remove(id))

    def contains(self, ids: Ids) -> Found:
        """The ids that are held; see `Tier.contains`."""
        with self._opened():
            return np.array([id in self._held for id in ids.tolist()], np.bool_)

    def score(self, ids: Ids, scores: Scores) -> None:
        """Pass scores to the eviction policy; see `CachingTier.score`."""
        with self._opened():
            for id, score in zip(ids.tolist(), scores.tolist(), strict=True):
                if id in self._held:
                    self._policy.scored(id, score)

    def close(self) -> None:
        """Wait for running calls, sync and close; see `Tier.close`."""
        with self._changed:
            self._closed = True
            while self._reading:
                self._changed.wait()
            file, self._file = self._file, None
            if file is not None:
                file.close()

    def __len__(self) -> int:
        with self._opened():
            return len(self._held)

    @contextmanager
    def _opened(self) -> Iterator[SlotFile]:
        """The open file, under the lock."""
        with self._changed:
            yield self._open()

    def _open(self) -> SlotFile:
        """The file, opened now if it was not. Raises `TierError` if another process has it, or after a fork."""
        if self._closed:
            raise TierClosedError(f"tier {self.name} is closed")
        if os.getpid() != self._process:
            raise TierError(f"tier {self.name} was opened before this process forked; open it anew in this one")
        if self._file is None:
            self._file = SlotFile(self.path, self.slot_bytes, self._slots, self._bank)
            self._held = self._file.held
            taken = set(self._held.values())
            self._free = [slot for slot in range(self._slots - 1, -1, -1) if slot not in taken]
            self._policy = make_policy(self._eviction, self._slots)
            for id in self._held:
                self._policy.admitted(id)
        return self._file

    def _claim(self) -> int | None:
        """A slot that may be filled, if need be after an eviction; None if every slot is being read."""
        if not self._free:
            victim = self._policy.victim(lambda id: self._held[id] not in self._reading)
            if victim is None:
                return None
            return self._remove(victim)
        return self._free.pop()

    def _remove(self, id: int) -> int:
        self._policy.removed(id)
        return self._held.pop(id)
