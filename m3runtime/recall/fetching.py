"""`Fetcher`: reads blocks through the hierarchy and decodes them, each memory into storage of its own."""

import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from m3runtime.bank import records
from m3runtime.bank.bank import Bank, as_ids
from m3runtime.documents.reference import Reference
from m3runtime.errors import BlockError
from m3runtime.memory.block import Ids
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.storage.hierarchy import Hierarchy
from m3runtime.stream import Part

_KNOWN = 4096
"""References that are kept in RAM."""


class Fetcher:
    """Delivers parts. Nothing is shared between two parts, so one that is kept keeps no other's bytes. Thread-safe."""

    def __init__(self, bank: Bank, hierarchy: Hierarchy, device: torch.device) -> None:
        self.bank = bank
        self.hierarchy = hierarchy
        self.device = device
        # On a CPU that is as fast, needs no copy, and values do not depend on what else is wanted.
        self.at_once = 1 if device.type == "cpu" else 1 << 16
        """How many memories to decode in one call."""
        self._known: OrderedDict[int, Reference] = OrderedDict()
        self._lock = threading.Lock()

    def references(self, ids: Sequence[int], *, fresh: bool = True) -> dict[int, Reference]:
        """The references of those that are remembered; damaged ones are set apart.

        Not ``fresh``, what is known of earlier calls is not asked of the home again, which may be slow to answer. What
        another process forgot meanwhile is there until a fresh call finds it gone, as the next hint's does.
        """
        known: dict[int, Reference] = {}
        if not fresh:
            with self._lock:
                known = {id: self._known[id] for id in ids if id in self._known}
        if len(missing := as_ids([id for id in ids if id not in known])):
            found, damaged = records.references(self.bank.home, missing)
            records.set_apart(self.bank.home, damaged)
            new = {id: one for id, one in zip(missing.tolist(), found, strict=True) if one is not None}
            known |= new
            with self._lock:
                for id in missing.tolist():
                    self._known.pop(id, None)
                self._known.update(new)
                while len(self._known) > _KNOWN:
                    self._known.popitem(last=False)
        return known

    def forget(self, ids: Iterable[int]) -> None:
        """They are not remembered any more."""
        with self._lock:
            for id in ids:
                self._known.pop(id, None)

    def part_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the part of a full reference, the most that one can have."""
        spec = self.bank.manifest.spec
        return 2 * len(spec.layers) * spec.kv_heads * spec.tokens * spec.head_dim * dtype.itemsize

    def read(self, ids: Ids) -> tuple[Ids, Tensor]:
        """The blocks of ids in one call, and which of the ids they are; those that are gone or bad are left out."""
        with torch.inference_mode(False):
            blocks = torch.empty(len(ids), self.hierarchy.slot_bytes, dtype=torch.uint8, device=self.device)
            found = self.hierarchy.read(ids, blocks)
            if not found.all():
                blocks, ids = blocks[torch.from_numpy(found).to(self.device)], ids[found]
        return ids, blocks

    def decode(self, ids: Ids, blocks: Tensor, dtype: torch.dtype) -> dict[int, Part | None]:
        """The part of each of these blocks; None where one cannot be decoded. Not more than `at_once`, on a CPU."""
        # Outside of inference mode: what takes them may be another thread, that is not in it.
        with torch.inference_mode(False), torch.no_grad():
            try:
                memories = self.bank.decode(blocks, dtype)
            except BlockError as error:
                if len(ids) > 1:
                    rows = (self.decode(ids[row : row + 1], blocks[row : row + 1], dtype) for row in range(len(ids)))
                    return {id: part for one in rows for id, part in one.items()}
                self.hierarchy.set_apart(int(ids[0]), str(error))
                return {int(ids[0]): None}
            return {id: _own(memories, row) for row, id in enumerate(ids.tolist())}


def _own(memories: MemoryTensors, row: int) -> Part:
    """One memory's keys and values, that hold no storage but their own."""
    tokens = int(memories.tokens[row])
    keys, values = (x[row, :, :, :tokens] for x in (memories.keys, memories.values))
    return (keys, values) if len(memories) == 1 else (keys.clone(), values.clone())
