"""The contenders of ``m3 bench tiers``."""

import os
import random
import secrets
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Self

import numpy as np
import torch
from torch import Tensor

from m3runtime import assembly
from m3runtime.config.schema import Config, TierConfig
from m3runtime.documents.reference import Place, Reference
from m3runtime.errors import InputError
from m3runtime.lab.bench.home_copy import HomeCopy, drop
from m3runtime.memory import block
from m3runtime.memory.block import Ids, as_ids
from m3runtime.storage.abilities import Persistent
from m3runtime.storage.hierarchy import Hierarchy
from m3runtime.storage.home import Batch, Home
from m3runtime.storage.opening import HOME
from m3runtime.storage.tier import CachingTier

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Contender:
    """A function to time, and its baseline."""

    work: Work
    baseline: str
    """Name of the contender to compare with; a baseline names itself."""
    before: Work | None = None
    """Called before each turn, untimed."""


PREAD, PREAD_CHECKED, PREAD_COLD = "pread loop", "pread loop, digests checked", "pread loop, cold"
COPY, COPY_SLOTS = "copy of the blocks", "copy of the slots"
TO_DEVICE, ON_DEVICE = "copy of the slots to the device", "copy of the slots on the device"
WRITE = "write and fsync"
WAY_UP, WAY_UP_KEPT = "home, checked", "home, checked, kept in all tiers"
WAY_UP_CACHED = "fastest tier"
DECODE, DECODED = "decode", "home to decoded keys and values"
MOST = 256
"""Most blocks to draw from."""


class TierRuns:
    """The blocks of a bank in every tier, in plain files and in plain memory. One thread."""

    def __init__(
        self, config: Config, device: torch.device, others: Mapping[str, TierConfig] = MappingProxyType({})
    ) -> None:
        """``others`` are homes of other kinds, by the name that they get, which hold the same blocks.

        Raises what opening the bank, its tiers and homes raises, and `InputError` if the bank is empty.
        """
        self.device = device
        with ExitStack() as opening:
            self.bank = assembly.open_bank(config, read_only=True)
            opening.callback(self.bank.close)
            self.slot_bytes = self.bank.home.slot_bytes
            every = self.bank.home.ids()
            self.ids = np.sort(np.array(random.Random(0).sample(every.tolist(), min(MOST, len(every))), np.uint64))
            folder = opening.enter_context(tempfile.TemporaryDirectory(prefix=".m3-bench-", dir=self.bank.path.parent))
            self._folder = Path(folder)
            own = _elsewhere(config, self._folder)
            # A bank of its own, for a tier that outlives the process.
            identity = secrets.token_hex(16)
            self._tiers = assembly.open_tiers(own, self.slot_bytes, device, identity=lambda: identity)
            self.hierarchy = Hierarchy(self._tiers, self.bank.home, self.bank.codecs, device)
            opening.callback(self.hierarchy.close)
            opening.callback(self._leave_nothing)
            self._bare = Hierarchy([], self.bank.home, self.bank.codecs, device)
            self._slots = self._buffer(len(self.ids))
            found = self._bare.home.read(self.ids, self._slots)
            self.ids, self._slots = self.ids[found], self._slots[torch.from_numpy(found)]
            if not len(self.ids):
                raise InputError(f"the bank at {config.bank} has no block to read")
            self._ends = [block.length(row) for row in self._slots.numpy()]
            self._plain = self._write_plain(self._folder / "blocks")
            opening.callback(os.close, self._plain)
            home = (config.tiers or (HOME,))[-1]
            self.copies = [
                self._copy(opening, name, config, tier) for name, tier in {self.bank.home.name: home, **others}.items()
            ]
            self._next = 0
            self.has_cold = self._cool_plain()
            self._open = opening.pop_all()
        self.sizes: list[int] = []
        """Total bytes of the blocks of each draw."""
        self.draw(1, 0)

    def _copy(self, opening: ExitStack, name: str, config: Config, tier: TierConfig) -> HomeCopy:
        copy = HomeCopy(name, self._folder / name, config, tier, self.slot_bytes)
        opening.callback(copy.close)
        self._commit(copy.home, self.ids, self._slots)
        return copy

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def draw(self, count: int, seed: int) -> None:
        """Draw the blocks of a round."""
        rows = sorted(random.Random(seed).sample(range(len(self.ids)), count))
        self._rows, self.drawn = rows, self.ids[rows]
        self._source = self._buffer(count).copy_(self._slots[rows])
        self.out = self._buffer(count)
        self.there = torch.empty(count, self.slot_bytes, dtype=torch.uint8, device=self.device)
        self._on_device = self._source.to(self.device)
        self.sizes.append(sum(self._ends[row] for row in rows))

    def contenders(self, count: int) -> dict[str, Contender]:
        """All contenders by name, for ``count`` blocks in one call. They use the blocks of the last `draw`."""
        name = self.bank.home.name
        found = {
            PREAD: Contender(self._pread, PREAD),
            PREAD_CHECKED: Contender(self._pread_checked, PREAD),
            COPY: Contender(self._copy_blocks, COPY),
            COPY_SLOTS: Contender(lambda: self.out.copy_(self._source), COPY_SLOTS),
            WRITE: Contender(self._write_and_sync, WRITE),
            f"{name}: read": Contender(lambda: self.bank.home.read(self.drawn, self.out), PREAD),
        }
        if self.has_cold:
            found[PREAD_COLD] = Contender(self._pread, PREAD_COLD, self._cool_plain)
        for copy in self.copies:
            found |= self._of_home(copy)
        if self.device.type != "cpu":
            to_device = Contender(lambda: self.there.copy_(self._source, non_blocking=True), TO_DEVICE)
            on_device = Contender(lambda: self.there.copy_(self._on_device), ON_DEVICE)
            found |= {TO_DEVICE: to_device, ON_DEVICE: on_device}
        room = count * self.slot_bytes
        tiers = [tier for tier in self._tiers if tier.capacity is None or tier.capacity >= room]
        for tier in tiers:
            found |= self._of_tier(tier)
        found[WAY_UP] = Contender(lambda: self._bare.read(self.drawn, self.there), PREAD)
        if tiers:
            through = self._through_tiers
            found[WAY_UP_KEPT] = Contender(through, PREAD, self._empty)
            nearest = self._copied(tiers[0])
            found[WAY_UP_CACHED] = Contender(through, nearest, lambda: self.hierarchy.lift(self.drawn))
        found[DECODE] = Contender(lambda: self._decode(self._on_device), DECODE)
        found[DECODED] = Contender(self._home_to_decoded, PREAD)
        return found

    def _of_home(self, copy: HomeCopy) -> dict[str, Contender]:
        def read() -> None:
            copy.home.read(self.drawn, self.out)

        def cool_in_use() -> None:
            others = np.setdiff1d(self.ids, self.drawn)[:1]
            copy.cool_in_use(others, self._buffer(len(others)))

        commit = Contender(lambda: self._commit(copy.written, self._new, self._sealed), WRITE, self._seal)
        found = {f"{copy.name}: commit": commit}
        if copy is not self.copies[0]:
            found[f"{copy.name}: read"] = Contender(read, PREAD)
        if self.has_cold and copy.in_folder:
            found[f"{copy.name}: read, cold"] = Contender(read, PREAD_COLD, cool_in_use)
            found[f"{copy.name}: first read, cold"] = Contender(read, PREAD_COLD, copy.cool)
        return found

    def _of_tier(self, tier: CachingTier) -> dict[str, Contender]:
        here, outside = tier.device.type == "cpu", tier.can_rot  # on a drive, or beyond a network

        def write() -> None:
            tier.write(self.drawn, self._source if here else self._on_device)

        found = {
            f"{tier.name}: read": Contender(
                lambda: tier.read(self.drawn, self.there), PREAD if outside else self._copied(tier), before=write
            ),
            f"{tier.name}: write": Contender(
                write,
                WRITE if outside else COPY_SLOTS if here else ON_DEVICE,
                before=lambda: tier.discard(self.drawn),
            ),
        }
        files = self._folder / str(self._tiers.index(tier))
        if self.has_cold and files.is_dir():

            def cool() -> None:
                write()
                drop(files)

            read_cold = Contender(lambda: tier.read(self.drawn, self.there), PREAD_COLD, before=cool)
            found[f"{tier.name}: read, cold"] = read_cold
        return found

    def _leave_nothing(self) -> None:
        for tier in self._tiers:
            if isinstance(tier, Persistent):
                tier.discard(self.ids)

    def _copied(self, tier: CachingTier) -> str:
        """The name of the plain copy to compare with reads from a tier to the device."""
        if self.device.type == "cpu":
            return COPY_SLOTS
        return TO_DEVICE if tier.device.type == "cpu" else ON_DEVICE

    # -- plain bytes --------------------------------------------------------------------------------------------

    def _write_plain(self, path: Path) -> int:
        """Write all blocks into one file; returns an open descriptor."""
        self._offsets: list[int] = []
        with path.open("wb") as file:
            for row, end in zip(self._slots.numpy(), self._ends, strict=True):
                self._offsets.append(file.tell())
                file.write(row[:end].data)
            file.flush()
            os.fsync(file.fileno())
        return os.open(path, os.O_RDONLY)

    def _pread(self) -> None:
        out = self.out.numpy()
        for place, row in enumerate(self._rows):
            os.preadv(self._plain, [out[place, : self._ends[row]].data], self._offsets[row])

    def _pread_checked(self) -> None:
        self._pread()
        out = self.out.numpy()
        for place, id in enumerate(self.drawn.tolist()):
            block.check(out[place], id=id, stamp=self.bank.codecs)

    def _copy_blocks(self) -> None:
        source, out = self._source.numpy(), self.out.numpy()
        for place, row in enumerate(self._rows):
            out[place, : self._ends[row]] = source[place, : self._ends[row]]

    def _write_and_sync(self) -> None:
        file = os.open(self._folder / "written", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            for place, row in enumerate(self._rows):
                os.write(file, self._source.numpy()[place, : self._ends[row]].data)
            os.fsync(file)
        finally:
            os.close(file)

    # -- homes --------------------------------------------------------------------------------------------------

    def _seal(self) -> None:
        """Seal the drawn blocks under new ids."""
        self._new = as_ids(range(self._next, self._next + len(self.drawn)))
        self._next += len(self.drawn)
        self._sealed = self._source.clone()
        heads = block.headers(self._sealed.numpy())
        for place, (row, id) in enumerate(zip(self._sealed.numpy(), self._new.tolist(), strict=True)):
            size, tokens = int(heads["payload"][place]), int(heads["tokens"][place])
            block.seal(row, id=id, tokens=tokens, payload_bytes=size, stamp=self.bank.stamp)

    def _commit(self, home: Home, ids: Ids, blocks: Tensor) -> None:
        references = [Reference(f"reference {id}", 2, places=(Place("bench", 0, 10),)) for id in ids.tolist()]
        vectors = np.full((len(ids), self.bank.manifest.dim), self.bank.manifest.dim**-0.5, np.float32)
        home.commit(Batch(ids, blocks, references, vectors))

    def _cool_plain(self) -> bool:
        """Drop the plain file from the page cache; returns True if that worked."""
        if not hasattr(os, "posix_fadvise") or not hasattr(os, "RWF_NOWAIT"):
            return False
        os.posix_fadvise(self._plain, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            os.preadv(self._plain, [bytearray(1)], self._offsets[-1], os.RWF_NOWAIT)
        except BlockingIOError:
            return True
        except OSError:  # a file system that cannot tell
            return False
        return False

    # -- the way up ---------------------------------------------------------------------------------------------

    def _through_tiers(self) -> None:
        self.hierarchy.read(self.drawn, self.there)

    def _empty(self) -> None:
        for tier in self._tiers:
            tier.discard(self.drawn)

    def _decode(self, blocks: Tensor) -> None:
        # One block in a call on a CPU, as in the runtime.
        for start in range(0, len(blocks), 1 if self.device.type == "cpu" else len(blocks)):
            some = blocks[start : start + 1] if self.device.type == "cpu" else blocks
            self.bank.decode(some, getattr(torch, self.bank.manifest.spec.dtype))

    def _home_to_decoded(self) -> None:
        self._bare.read(self.drawn, self.there)
        self._decode(self.there)

    def _buffer(self, count: int) -> Tensor:
        return torch.zeros(count, self.slot_bytes, dtype=torch.uint8, pin_memory=self.device.type == "cuda")


def _elsewhere(config: Config, folder: Path) -> Config:
    """This configuration with each caching tier that keeps files in a folder of its own here, named by its place."""
    tiers = [
        TierConfig.model_validate({"kind": tier.kind, **tier.options, "path": str(folder / str(place))})
        if "path" in tier.options
        else tier
        for place, tier in enumerate(config.tiers)
    ]
    return config.model_copy(update={"tiers": tuple(tiers)})
