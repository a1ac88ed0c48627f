"""Caching tiers with one mistake each, in files: the tier of docs/write-a-tier.md, done wrong."""

import atexit
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from m3runtime.errors import TierError
from m3runtime.memory.block import Found, Ids
from tests.testing import guide
from tests.testing.broken.suites import make_suites

FOLDER = Path(tempfile.mkdtemp(prefix="m3-guide-"))
atexit.register(shutil.rmtree, FOLDER)
guide.write(FOLDER)
FolderTier: Any = guide.load(FOLDER, "folder_tier").FolderTier
Contract: Any = guide.load(FOLDER, "test_folder_tier").TestFolderTier


class IgnoresAShortRead(FolderTier):
    def read(self, ids: Ids, out: Tensor) -> Found:
        rows = out.clone()
        found: Found = super().read(ids, rows)
        for row in np.flatnonzero(found).tolist():
            size = self.file(int(ids[row])).stat().st_size
            out[row, :size] = rows[row, :size]
        return found


class ForgetsWhatItHeldOnOpening(FolderTier):
    def __init__(self, *, path: Path, slot_bytes: int, capacity: int) -> None:
        super().__init__(path=path, slot_bytes=slot_bytes, capacity=0)
        super().__init__(path=path, slot_bytes=slot_bytes, capacity=capacity)


class HoldsAllThatItFinds(FolderTier):
    """Its capacity is that of the process before, if that was larger."""

    def __init__(self, *, path: Path, slot_bytes: int, capacity: int) -> None:
        found = len(list(Path(path).glob("*.block"))) * slot_bytes
        super().__init__(path=path, slot_bytes=slot_bytes, capacity=max(found, capacity))


class LeavesTheFileOfWhatItDiscards(FolderTier):
    def discard(self, ids: Ids) -> None:
        kept = {id: self.file(id).read_bytes() for id in ids.tolist() if id in self}
        super().discard(ids)
        for id, block in kept.items():
            self.file(id).write_bytes(block)


class SignedFileNames(FolderTier):
    """2**64 - 1 is ``-1`` in its file's name, and another id when it is read back."""

    def file(self, id: int) -> Path:
        return self.path / f"{abs(int(np.uint64(id).astype(np.int64))):016x}.block"


class WritesWhatItHolds(FolderTier):
    """Puts the file in place first, and then looks whether it holds the block."""

    def write(self, ids: Ids, blocks: Tensor) -> None:
        for row, id in zip(blocks, ids.tolist(), strict=True):
            if id in self:
                self.file(id).write_bytes(bytes(row.tolist()))
        super().write(ids, blocks)


class AnUnreadableFileIsAMiss(FolderTier):
    """Of the whole batch: what can be read in it is missed too."""

    def read(self, ids: Ids, out: Tensor) -> Found:
        try:
            return super().read(ids, out)  # type: ignore[no-any-return]
        except TierError:
            return np.zeros(len(ids), np.bool_)


class Folders(Contract):
    kind: Any

    def make(self, *, slot_bytes: int, capacity: int) -> Any:
        return self.kind(path=tempfile.mkdtemp(dir=self.folder), slot_bytes=slot_bytes, capacity=capacity)

    def reopen(self, tier: Any, *, capacity: int) -> Any:
        return self.kind(path=tier.path, slot_bytes=tier.slot_bytes, capacity=capacity)


del Contract
BROKEN = FolderTier.__subclasses__()
globals().update(make_suites(Folders, __name__, FolderTier, BROKEN))
