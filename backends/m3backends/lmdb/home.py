"""`LmdbHome`: a bank's blocks, references and embeddings in LMDB."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from m3backends.lmdb.audit import audit
from m3backends.lmdb.compression import ENOUGH, PLAIN, ZSTD, Compression, Packing, decide, load_dictionary
from m3backends.lmdb.environment import Durability, Environment, Reading, Writing
from m3backends.lmdb.forgetting import forget
from m3backends.lmdb.reading import LmdbReading
from m3backends.lmdb.records import (
    Source,
    digest,
    pack_id,
    pack_ids,
    pack_reference,
    pack_source,
    pack_text,
    unpack_source,
)
from m3backends.lmdb.schema import Databases, create_folder, open_databases, store_packing
from m3runtime.config.units import Size
from m3runtime.documents.reference import Reference
from m3runtime.errors import InputError
from m3runtime.memory.block import HEADER_BYTES, Found, Ids, Rows, headers
from m3runtime.storage.abilities import Damage
from m3runtime.storage.home import Batch
from m3runtime.storage.tier import check_ids, check_rows


class LmdbHome(LmdbReading):
    """The home in a folder of its own, ``path``.

    ``slot_bytes`` is fixed when the folder is made; without it, what is there is opened. ``max_size`` bounds the file
    in bytes. With ``compression="zstd"`` new blocks are compressed as the first `ENOUGH` blocks showed it to be worth;
    what is there can be read either way. Every method is one transaction (`embeddings`: one a batch). Thread-safe.

    ``durability`` says what a call that returned survives. In every mode it survives that the process is killed.

    - ``full``: a power cut, too.
    - ``commit``: a power cut may undo the last calls, each wholly, and tears nothing.
    - ``relaxed``: a power cut may undo everything since the home was opened and, on a file system that writes in
      another order than it was told, tear the bank: it is verified when it is opened next, and must then be restored
      or written anew. Closing makes all durable.

    One process, of one opening, writes; any number of others read with ``read_only=True`` beside it, and see each
    commit as a whole. A home must not be used across a fork: it raises `TierError` then.

    Raises `BankMissingError` if there is nothing to open, `BankFormatError` if another version wrote it,
    `BankMismatchError` if its slots are of another size, `BankBusyError` if it is open for writing already,
    `BankError` if it is no bank or is damaged.
    """

    name = "lmdb"

    def __init__(
        self,
        *,
        path: str | os.PathLike[str],
        slot_bytes: int | None = None,
        max_size: Size | None = None,
        compression: Compression = "none",
        durability: Durability = "full",
        read_only: bool = False,
    ) -> None:
        self.path = Path(path)
        self.compression = compression
        self._packing: Packing | None = None
        self._deciding = threading.Lock()
        create_folder(self.path, slot_bytes, read_only)
        self._environment = Environment(
            self.path,
            databases=len(Databases._fields),
            max_size=max_size,
            read_only=read_only,
            durability=durability,
        )
        try:
            self._db, self.slot_bytes, self._above, self._packing = open_databases(self._environment, slot_bytes)
        except BaseException:
            self._environment.close()
            raise
        self._dictionary = load_dictionary(self._packing.dictionary) if self._packing else None

    def write(self, ids: Ids, blocks: Tensor) -> None:
        """Store blocks that have no reference: they can be read, and nothing will recall them. See `commit`.

        Ids that are held are passed over. Raises `InputError` for an id that was used and is no longer.
        """
        stored, size = self._packed(ids, blocks)

        def work(txn: Writing) -> None:
            new = [row for row, key in enumerate(pack_ids(ids)) if not self._has(txn, key)]
            self._use(txn, ids[new])
            for row in new:
                txn.put(pack_id(int(ids[row])), stored[row], overwrite=False, db=self._db.blocks)

        self._environment.write(work, need=size)

    def commit(self, batch: Batch, *, replacing: Ids | None = None) -> None:
        """See `Home.commit`."""
        stored, size = self._packed(batch.ids, batch.blocks)
        self._add(batch.ids, batch.references, batch.embeddings, stored, size, replacing)

    def catalogue(self, ids: Ids, references: Sequence[Reference], embeddings: npt.NDArray[np.float32]) -> None:
        """See `Home.catalogue`."""
        check_ids(ids)
        self._add(ids, references, embeddings, None, 0, None)

    def fill(self, ids: Ids, blocks: Tensor) -> Found:
        """See `Home.fill`."""
        stored, size = self._packed(ids, blocks)

        def work(txn: Writing) -> Found:
            filled = np.zeros(len(ids), np.bool_)
            for row, key in enumerate(pack_ids(ids)):
                if self._is_cold(txn, key):
                    txn.put(key, stored[row], db=self._db.blocks)
                    self._db.cold.delete(txn, key)
                    filled[row] = True
            return filled

        return self._environment.write(work, need=size)

    def _add(
        self,
        ids: Ids,
        references: Sequence[Reference],
        embeddings: npt.NDArray[np.float32],
        stored: Sequence[bytes | memoryview] | None,
        size: int,
        replacing: Ids | None,
    ) -> None:
        """Add references with what is stored of their blocks, ``size`` bytes of it; they are cold without."""
        count = len(ids)
        vectors = np.ascontiguousarray(embeddings, "<f4")
        if len(references) != count or vectors.ndim != 2 or len(vectors) != count:
            raise InputError(f"a batch of {count} ids has {len(references)} references, embeddings {vectors.shape}")
        if not np.isfinite(vectors).all():
            raise InputError("a batch has embeddings that are not finite")
        if len(np.unique(ids)) != count:
            raise InputError("a batch has an id twice")

        def work(txn: Writing) -> None:
            if replacing is not None:
                forget(txn, self._db, replacing)
            self._use(txn, ids)
            if count:
                self._check_length(txn, vectors.shape[1])
            for row, (key, reference) in enumerate(zip(pack_ids(ids), references, strict=True)):
                if not self._db.digests.put(txn, digest(reference.text), key, overwrite=False):
                    raise InputError(f"id {ids[row]}: its text is remembered already: {reference.text[:60]!r}")
                if stored is None:
                    self._db.cold.put(txn, key, b"")
                else:
                    txn.put(key, stored[row], db=self._db.blocks)
                self._db.references.put(txn, key, pack_reference(reference))
                txn.put(digest(reference.source), key, db=self._db.members)
                self._db.embeddings.put(txn, key, vectors[row].tobytes())
            members: dict[str, list[int]] = {}
            for id, reference in zip(ids.tolist(), references, strict=True):
                members.setdefault(reference.source, []).append(id)
            for name, more in members.items():
                source = self._db.sources.read(txn, digest(name), unpack_source) or Source(name, 0, 0)
                self._db.sources.put(txn, digest(name), pack_source(source.with_more(more)))

        texts = sum(len(reference.text) + len(reference.source) for reference in references)
        self._environment.write(work, need=size + vectors.nbytes + 4 * texts)

    def discard(self, ids: Ids) -> None:
        """Forget for good: block, reference, embedding and all; the ids are never used again."""
        self._environment.write(lambda txn: forget(txn, self._db, ids), reserve=True)

    def quarantine(self, id: int, reason: str) -> None:
        """See `Home.quarantine`. Passes over an id that has no block and is not cold."""
        key = pack_id(id)

        def work(txn: Writing) -> None:
            if self._has(txn, key) or self._db.cold.has(txn, key):
                self._db.quarantine.put(txn, key, pack_text(reason))

        self._environment.write(work, reserve=True)

    def set_meta(self, key: str, value: bytes) -> None:
        """See `Home.set_meta`. A key has 1 to 511 bytes."""

        def work(txn: Writing) -> None:
            self._db.meta.put(txn, pack_text(key), value)

        self._environment.write(work, need=len(value), reserve=True)

    def audit(self, progress: Callable[[int, int], None] | None = None) -> Iterator[Damage]:
        """See `Auditable.audit`. The structure of the file is left out while another process has it open for writing.

        Its steps are records. Memory is bounded, but for two bytes for each page of the file.
        """
        return audit(self._environment, self._db, progress)

    def _packed(self, ids: Ids, blocks: Tensor) -> tuple[list[bytes | memoryview], int]:
        """What is stored of each block, and its bytes altogether. Raises `InputError` if the headers do not fit."""
        rows, ends = self._checked_blocks(ids, blocks)
        own = [rows[row, :end] for row, end in enumerate(ends.tolist())]
        pack = self._how_to_pack(own).packer()
        stored = [pack(block) for block in own]
        return stored, sum(len(one) for one in stored)

    def _how_to_pack(self, blocks: list[Rows]) -> Packing:
        """What was decided for this home; decided now, and stored, if these and those there are enough."""
        if self.compression == "none":
            return PLAIN
        with self._deciding:
            if self._packing is None:
                samples = blocks + self._first_blocks(ENOUGH - len(blocks))
                if len(samples) < ENOUGH:
                    return ZSTD
                packing = decide(samples)
                self._environment.write(lambda txn: store_packing(txn, self._db, packing))
                self._dictionary = load_dictionary(packing.dictionary)
                self._packing = packing
            return self._packing

    def _first_blocks(self, count: int) -> list[Rows]:
        def work(txn: Reading) -> list[Rows]:
            stored = islice(txn.cursor(self._db.blocks).iternext(keys=False), max(0, count))
            return [self._unpack(txn, block).copy() for block in stored]

        return self._environment.read(work)

    def _checked_blocks(self, ids: Ids, blocks: Tensor) -> tuple[Rows, npt.NDArray[np.int64]]:
        """Rows on the CPU and where their blocks end. Raises `InputError` if the headers do not fit."""
        check_rows(ids, blocks, self.slot_bytes)
        rows = blocks.cpu().contiguous().numpy()
        if not len(ids):
            return rows, np.zeros(0, np.int64)
        if self.slot_bytes < HEADER_BYTES:
            raise InputError(f"slots of {self.slot_bytes} bytes hold no block")
        header = headers(rows)
        ends = HEADER_BYTES + header["payload"].astype(np.int64)
        wrong = np.flatnonzero((header["id"] != ids) | (ends > self.slot_bytes))
        if len(wrong):
            raise InputError(f"id {ids[wrong[0]]} comes with bytes that are not its block")
        return rows, ends

    def _check_length(self, txn: Writing, dim: int) -> None:
        """Raise `InputError` unless embeddings of this length fit those there."""
        first = txn.cursor(self._db.embeddings.handle)
        if first.first():
            there = len(self._db.embeddings.open(first.key(), first.value())) // 4
            if there != dim:
                raise InputError(f"embeddings have {dim} numbers, those there {there}")

    def _use(self, txn: Writing, ids: Ids) -> None:
        """Take these ids, which nobody used before."""
        if len(ids):
            if int(ids.min()) < (next_id := self._next_id(txn)):
                raise InputError(f"id {ids.min()} was used before; the next is {next_id}")
            self._db.home.put(txn, b"next_id", b"%d" % (int(ids.max()) + 1))
