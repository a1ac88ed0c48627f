"""`verify`: reads all of a bank and reports its damage."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from m3runtime import assembly
from m3runtime.bank import records
from m3runtime.bank.bank import Bank, home_folder
from m3runtime.bank.bias import BiasDirections
from m3runtime.bank.manifest import Manifest
from m3runtime.config.schema import Config
from m3runtime.documents import expiry
from m3runtime.documents.reference import Reference
from m3runtime.errors import BankError, BankFormatError, BankMissingError, BlockError, IndexFileError
from m3runtime.memory import block
from m3runtime.memory.block import BlockStamps, Ids, as_ids
from m3runtime.storage.home import Damage, Home
from m3runtime.storage.home_index import HomeIndex
from m3runtime.writing.index_check import wrong_vectors

OnProgress = Callable[[str, int, int], None]
"""Called with the title of a task, its steps done, and all its steps."""

BATCH_BYTES = 64 << 20
"""Bytes of blocks and of the memories decoded from them that are held at once, about."""
_LARGEST_SLOT = 1 << 30
"""The largest slot that is read without a codec to vouch for it: a false size must not take the memory."""
_LENGTH_ERROR = 1e-2
"""The tolerance for the length of an embedding, which is 1."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The result of `verify`."""

    blocks: int
    """Memories that have or should have a block, quarantined ones included; cold references have none."""
    good: int
    bytes: int
    """Bytes of the blocks with a right digest."""
    quarantined: int
    damage: tuple[Damage, ...]
    """All damage. A quarantined memory counts as damaged until it is repaired."""
    sources: Mapping[int, str]
    """Maps each damaged memory to the source of its reference, if that can still be read."""
    notes: tuple[str, ...]
    """Harmless findings: the index, which is a cache, may be missing or behind."""
    cold: int = 0
    """References that are in the catalogue and not encoded yet."""
    codecs: Mapping[str, int] = field(default_factory=dict)
    """Blocks whose header and digest are right, by the kind and the fingerprint of their codec."""

    @property
    def bad(self) -> int:
        """Memories whose block is damaged, missing or quarantined."""
        return self.blocks - self.good

    @property
    def clean(self) -> bool:
        """Is nothing damaged?"""
        return not self.damage


def verify(config: Config, progress: OnProgress | None = None) -> VerifyReport:
    """Read all of the configured bank, in memory that does not grow with it. Changes nothing.

    Other processes may read, write and forget meanwhile. Raises `BankMissingError`, `BankFormatError`, or `BankError`
    if the home cannot be opened.
    """
    with assembly.open_home(config, read_only=True)(path=home_folder(config.bank)) as home:
        return examine(config, home, progress)


def examine(config: Config, home: Home, progress: OnProgress | None = None) -> VerifyReport:
    """Verify a bank whose home is open already."""
    examination = _Examination(config, home, progress or (lambda *_: None))
    examination.open_bank()
    examination.read_bias()
    examination.read_records()
    examination.read_memories()
    examination.compare_index()
    return examination.report()


class _Examination:
    """Goes through a bank step by step and collects its damage."""

    def __init__(self, config: Config, home: Home, progress: OnProgress) -> None:
        self.config = config
        self.home = home
        self.progress = progress
        self.manifest: Manifest | None = None
        self.bank: Bank | None = None
        self.blocks = self.good = self.bytes = self.cold = 0
        self.codecs = Counter[str]()
        self.notes: list[str] = []
        # Keyed by part and id: the home's own audit and the reading of each memory may find the same damage.
        self._damage: dict[tuple[str, int | None, str | None], Damage] = {}

    def found(self, where: str, id: int | None, what: str) -> None:
        """Note damage, once for each part of a memory."""
        self._damage.setdefault((where, id, what if id is None else None), Damage(where, id, what))

    def open_bank(self) -> None:
        """Read manifest and codec. Without them only the rest is checked."""
        try:
            self.manifest = Manifest.read(self.config.bank, self.home)
        except (BankFormatError, BankMissingError):
            raise
        except BankError as error:
            self.found("manifest", None, str(error))
            return
        try:
            load_codec = partial(assembly.load_codec, self.config)
            self.bank = Bank.over(self.config.bank, self.home, self.manifest, load_codec)
        except BankError as error:
            self.found("codec", None, str(error))

    def read_bias(self) -> None:
        """Read the bias directions, if the bank has any."""
        if self.manifest is not None:
            try:
                BiasDirections.load(self.config.bank, self.manifest)
            except BankError as error:
                self.found("bias", None, str(error))

    def read_records(self) -> None:
        """Let the home audit its own records."""
        for one in self.home.audit(partial(self.progress, "Reading the home's records")):
            self.found(one.where, one.id, one.what)

    def read_memories(self) -> None:
        """Check block, reference and embedding of every memory."""
        if self.bank is None and self.home.slot_bytes > _LARGEST_SLOT:
            self.found("home", None, f"it states slots of {self.home.slot_bytes} bytes")
            return
        ids = self._remembered()
        size = self._batch_size()
        slots = torch.zeros(min(size, len(ids)), self.home.slot_bytes, dtype=torch.uint8)
        title = "Reading memories"
        self.progress(title, 0, len(ids))
        for start in range(0, len(ids), size):
            some = ids[start : start + size]
            damage, cold_ids = self._read_batch(some, slots[: len(some)])
            if damage:  # memories forgotten meanwhile are not missed
                there = set(self._remembered().tolist())
                damage = [one for one in damage if one.id in there]
                some = some[[id in there for id in some.tolist()]]
            for one in damage:
                self.found(one.where, one.id, one.what)
            cold = len(np.intersect1d(some, cold_ids))
            self.cold += cold
            self.blocks += len(some) - cold
            self.good += len(some) - cold - sum(one.where == "block" for one in damage)
            self.progress(title, min(start + size, len(ids)), len(ids))

    def compare_index(self) -> None:
        """Compare the index file with the home's embeddings, and look whether that of the words is whole."""
        if self.bank is None:
            return
        if self.config.recall.search != "dense":
            try:
                assembly.lexical_index(self.bank).load()
            except IndexFileError as error:
                self.notes.append(f"{error}; the index is rebuilt when the bank is opened")
        try:
            index = assembly.bank_index(self.config, self.bank).load()
        except IndexFileError as error:
            self.notes.append(f"{error}; the index is rebuilt when the bank is opened")
            return
        if isinstance(index, HomeIndex):  # it searches the home's own embeddings, which are checked there
            return
        ids, there = self.home.ids(), index.ids()
        # It may or may not hold cold and expired references: that depends on the process that wrote it.
        hidden = np.union1d(self.home.cold(), records.expired(self.home, expiry.today()))
        lacks, has = len(np.setdiff1d(np.setdiff1d(ids, there), hidden)), len(np.setdiff1d(there, ids))
        if lacks or has:
            self.notes.append(
                f"the index lacks {lacks} memories and holds {has} that are not remembered; "
                "it catches up when the bank is opened"
            )
        shared = np.intersect1d(ids, there)
        progress = partial(self.progress, "Comparing the index")
        for id in wrong_vectors(self.config, self.bank, index, shared, progress).tolist():
            self.found("index", id, "its vector in the index is not its embedding")

    def report(self) -> VerifyReport:
        """The report."""
        damage = tuple(self._damage.values())
        ids = sorted({one.id for one in damage if one.id is not None})
        found, _ = records.references(self.home, as_ids(ids))
        sources = {id: one.places[0].name for id, one in zip(ids, found, strict=True) if one is not None}
        quarantined = len(records.quarantined(self.home))
        return VerifyReport(
            self.blocks, self.good, self.bytes, quarantined, damage, sources, tuple(self.notes), self.cold, self.codecs
        )

    def _remembered(self) -> Ids:
        return np.union1d(self.home.ids(), as_ids(list(records.quarantined(self.home))))

    def _batch_size(self) -> int:
        """The number of memories that are read at once."""
        each = self.home.slot_bytes
        if self.manifest is not None:
            spec = self.manifest.spec
            each += 2 * 4 * spec.vectors_per_token * spec.tokens * spec.head_dim
        return max(1, min(256, BATCH_BYTES // each))

    def _read_batch(self, ids: Ids, slots: Tensor) -> tuple[list[Damage], Ids]:
        """The damage of these memories, and those of them that are cold."""
        references, wrong = records.references(self.home, ids)
        damage = [Damage("reference", id, what) for id, what in wrong.items()]
        damage += [
            Damage("reference", id, "there is none")
            for id, one in zip(ids.tolist(), references, strict=True)
            if one is None and id not in wrong
        ]
        damage += self._read_embeddings(ids)
        cold = self.home.cold(ids)  # before the block is read: it may be stored meanwhile
        there = self.home.read(ids, slots)
        cold = np.setdiff1d(cold, ids[there])
        quarantined = records.quarantined(self.home)
        whole = []
        for row, (id, reference) in enumerate(zip(ids.tolist(), references, strict=True)):
            if there[row]:
                try:
                    self.bytes += self._check(slots[row], id, reference)
                    whole.append(row)
                except BlockError as error:
                    damage.append(Damage("block", id, str(error).removeprefix(f"block {id}: ")))
            elif id not in cold:
                why = f"quarantined: {quarantined[id]}" if id in quarantined else "there is none"
                damage.append(Damage("block", id, why))
        damage += [Damage("block", int(ids[row]), what) for row, what in self._undecodable(slots, whole).items()]
        return damage, cold

    def _read_embeddings(self, ids: Ids) -> list[Damage]:
        wrong: dict[int, str] = {}
        dim = None if self.manifest is None else self.manifest.dim
        for some, vectors in records.embeddings(self.home, ids, dim, wrong):
            lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
            for row in np.flatnonzero(np.abs(lengths - 1) > _LENGTH_ERROR).tolist():
                wrong[int(some[row])] = f"a vector of length {lengths[row]:.3g}, not 1"
        return [Damage("embedding", id, what) for id, what in wrong.items()]

    def _check(self, slot: Tensor, id: int, reference: Reference | None) -> int:
        """The length of a block, after every check. Raises `BlockError`."""
        if self.manifest is None:
            return 0
        stamps = BlockStamps(self.manifest.stamps) if self.bank is None else self.bank.codecs
        end = block.check(slot.numpy(), id=id, stamp=stamps)
        header = block.headers(slot[None].numpy())[0]
        tokens, spec = int(header["tokens"]), self.manifest.spec
        least, most = 1, spec.tokens
        if reference:
            least = max(least, min(reference.tokens, most))
            if not (self.manifest.headings and reference.heading):  # whose tokens are not recorded
                most = min(reference.tokens, most)
        if not least <= tokens <= most:
            raise BlockError(f"block {id}: {tokens} tokens are not those of its reference")
        if self.bank is not None:
            codec = self.bank.codecs.of(header)
            if end != block.HEADER_BYTES + (size := codec.payload_bytes(tokens)):
                raise BlockError(f"block {id}: a payload of {end - block.HEADER_BYTES} bytes, not {size}")
            self.codecs[f"{codec.kind} ({codec.fingerprint[:16]})"] += 1
        return end

    def _undecodable(self, slots: Tensor, rows: list[int]) -> dict[int, str]:
        """Maps each row that does not decode to finite numbers to the reason."""
        if self.bank is None or not rows:
            return {}
        try:
            memories = self.bank.decode(slots[rows], getattr(torch, self.bank.manifest.spec.dtype))
            if all(bool(part.isfinite().all()) for part in (memories.keys, memories.values)):
                return {}
            what = "does not decode to finite numbers"
        except BlockError as error:
            what = str(error)
        if len(rows) == 1:
            return {rows[0]: what}
        return {row: what for one in rows for row, what in self._undecodable(slots, [one]).items()}
