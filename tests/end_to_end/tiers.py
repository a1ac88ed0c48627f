"""A tier whose blocks outlive the process, reached from configurations by its import path."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from m3runtime.config.units import Size
from m3runtime.errors import TierError
from m3runtime.memory.block import Ids
from m3runtime.storage.slab import SlabTier


class KeptTier(SlabTier):
    """A slab in RAM, and beside it a file for each block in the folder ``path``. Give it room for all of them."""

    def __init__(self, *, slot_bytes: int, capacity: Size, path: str) -> None:
        super().__init__(
            name="kept", slot_bytes=slot_bytes, capacity=capacity, eviction="lru", device=torch.device("cpu")
        )
        self.folder = Path(path)
        self.folder.mkdir(exist_ok=True)
        for file in filter(Path.is_file, self.folder.glob("*.block")):
            block = torch.from_numpy(np.fromfile(file, np.uint8))
            super().write(np.array([int(file.stem)], np.uint64), block[None])

    def ids(self) -> Ids:
        return np.array(sorted(self._held), np.uint64)

    def write(self, ids: Ids, blocks: Tensor) -> None:
        super().write(ids, blocks)
        for id, row in zip(ids.tolist(), blocks.numpy(), strict=True):
            part = self.folder / f"{id}.part"
            part.write_bytes(row.tobytes())
            part.replace(self.folder / f"{id}.block")

    def discard(self, ids: Ids) -> None:
        try:
            for id in ids.tolist():
                (self.folder / f"{id}.block").unlink(missing_ok=True)
        except OSError as error:
            raise TierError(f"tier {self.name}: {error}") from error
        super().discard(ids)


class StubbornTier(KeptTier):
    """Discards nothing while its folder has a file ``stubborn``."""

    def discard(self, ids: Ids) -> None:
        if (self.folder / "stubborn").exists():
            raise TierError(f"tier {self.name}: it is stubborn")
        super().discard(ids)
