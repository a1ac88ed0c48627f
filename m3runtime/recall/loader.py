"""`Loader`: reads blocks through the hierarchy and decodes them into parts, each with storage of its own."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from m3runtime.bank import records
from m3runtime.bank.bank import Bank
from m3runtime.device.side_stream import SideStream
from m3runtime.documents import expiry
from m3runtime.documents.reference import Reference
from m3runtime.errors import BlockError
from m3runtime.memory.block import Ids, as_ids
from m3runtime.observe.metrics import Phases
from m3runtime.recall.lease import Entry, Lease, Loaded, Part
from m3runtime.recall.memory_store import MemoryStore
from m3runtime.retrieval.match import Match
from m3runtime.storage.hierarchy import Hierarchy

DECODE_BYTES = 256 * 1024**2
"""The most bytes of float32 values that one call of the codec makes on an accelerator, but for a single memory."""


class Loader:
    """Loads what a `MemoryStore` lacks: claims entries, reads and decodes their blocks, settles them. Thread-safe."""

    def __init__(
        self,
        bank: Bank,
        hierarchy: Hierarchy,
        store: MemoryStore,
        device: torch.device,
        today: Callable[[], str] = expiry.today,
    ) -> None:
        self.bank = bank
        self.hierarchy = hierarchy
        self.store = store
        self.device = device
        self._today = today
        self.side = SideStream(device)
        self._batch = batch_size(device, part_bytes(bank, torch.float32))

    def load(
        self,
        leases: Sequence[Lease],
        by: object,
        phases: Phases,
        *,
        aside: bool,
        blocks: Mapping[int, Tensor] | None = None,
    ) -> list[int]:
        """Load the leased memories, all of one dtype, that nobody loads yet. Returns their ids.

        ``by`` becomes their `Entry.loader`. They are read in one call and decoded in batches of bounded size. With
        ``aside`` the work goes to a CUDA stream of this thread, in parallel with decoding by the model. ``blocks``
        (``uint8[slot_bytes]`` by id) are decoded as they are, without asking the hierarchy. An error fails every entry
        that is not settled yet, and is raised.
        """
        try:
            if claimed := self.store.claim(leases, by):
                with self.side.use() if aside else nullcontext():
                    self._load(claimed, phases, blocks or {})
        except BaseException as error:
            self.store.fail((lease.entry for lease in leases), by, error)
            raise
        return [entry.id for entry in claimed]

    def _load(self, entries: Sequence[Entry], phases: Phases, blocks: Mapping[int, Tensor]) -> None:
        """Read and settle claimed entries."""
        entry_of = {entry.id: entry for entry in entries}
        with phases.phase("read", len(entries)):
            references = self.references(list(entry_of))
            ids, rows = self._read([id for id in entry_of if id in references], blocks)
        for id in entry_of.keys() - set(ids.tolist()):  # not remembered, cold, or bad
            self.store.settle(entry_of[id], None)
        for start in range(0, len(ids), self._batch):
            batch = ids[start : start + self._batch].tolist()
            wanted = {entry.id for entry in self.store.keep_wanted([entry_of[id] for id in batch])}
            at = [start + row for row, id in enumerate(batch) if id in wanted]
            if not at:
                continue
            with phases.phase("decode", len(at)):
                whole = len(at) == len(batch)
                some = rows[start : start + len(batch)] if whole else rows[at]
                parts = self._decode(ids[at], some, entries[0].dtype)
            ready = self.side.mark()
            for id, part in parts.items():
                self.store.settle(entry_of[id], None if part is None else Loaded(part, references[id], ready))

    def references(self, ids: Sequence[int]) -> dict[int, Reference]:
        """The references of those ids that the home remembers, without what has expired.

        Damaged records are quarantined.
        """
        found, damaged = records.references(self.bank.home, as_ids(ids))
        records.set_apart(self.bank.home, damaged)
        today = self._today()
        living = {id: (one, one.living(today)) for id, one in zip(ids, found, strict=True) if one is not None}
        return {id: replace(one, places=places) for id, (one, places) in living.items() if places}

    def cited(self, matches: Sequence[Match]) -> list[Reference | None]:
        """The reference of each match, with the places of those that it stands for; None where it is not remembered."""
        found = self.references([id for match in matches for id in (match.id, *match.stands_for)])
        return [
            found[match.id].joined([found[id] for id in match.stands_for if id in found]) if match.id in found else None
            for match in matches
        ]

    def forget_strangers(self, ids: Sequence[int]) -> None:
        """Remove those of these memories from the store that another process has forgotten."""
        if ids:
            self.store.forget(set(ids) - self.references(ids).keys())

    def _read(self, ids: Sequence[int], given: Mapping[int, Tensor]) -> tuple[Ids, Tensor]:
        """The blocks that were found, ``uint8[n, slot_bytes]`` on the device, and their ids; ``given`` ones first."""
        mine = [id for id in ids if id in given]
        wanted = as_ids([id for id in ids if id not in given])
        with torch.inference_mode(False):
            rows = torch.empty(len(wanted), self.hierarchy.slot_bytes, dtype=torch.uint8, device=self.device)
            if len(wanted):
                found = self.hierarchy.read(wanted, rows)
                if not found.all():
                    rows, wanted = rows[torch.from_numpy(found).to(self.device)], wanted[found]
            if mine:
                rows = torch.cat([torch.stack([given[id] for id in mine]).to(self.device), rows])
        return as_ids([*mine, *wanted.tolist()]), rows

    def _decode(self, ids: Ids, blocks: Tensor, dtype: torch.dtype) -> dict[int, Part | None]:
        """The part of each block; None, and quarantined, where one cannot be decoded."""
        # Outside of inference mode: the thread that leases a part may not be in it.
        with torch.inference_mode(False), torch.no_grad():
            try:
                memories = self.bank.decode(blocks, dtype)
            except BlockError as error:
                if len(ids) > 1:
                    single = (self._decode(ids[row : row + 1], blocks[row : row + 1], dtype) for row in range(len(ids)))
                    return {id: part for one in single for id, part in one.items()}
                self.hierarchy.set_apart(int(ids[0]), str(error))
                return {int(ids[0]): None}
            parts: dict[int, Part | None] = {}
            for row, id in enumerate(ids.tolist()):
                tokens = int(memories.tokens[row])
                keys, values = (x[row, :, :, :tokens] for x in (memories.keys, memories.values))
                # A view would keep the bytes of the whole batch alive.
                parts[id] = (keys, values) if len(memories) == 1 else (keys.clone(), values.clone())
            return parts


def batch_size(device: torch.device, part_bytes: int) -> int:
    """The number of memories that one call of the codec decodes, each of ``part_bytes`` in float32."""
    # One memory at a time is as fast on a CPU, needs no copy, and no value depends on what else is decoded.
    return 1 if device.type == "cpu" else max(1, DECODE_BYTES // part_bytes)


def part_bytes(bank: Bank, dtype: torch.dtype) -> int:
    """Bytes of the part of a full reference, the most that one part can have."""
    spec = bank.manifest.spec
    return 2 * len(spec.layers) * spec.kv_heads * spec.tokens * spec.head_dim * dtype.itemsize
