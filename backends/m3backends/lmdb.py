"""`LmdbHome`: a bank's blocks, references and embeddings in LMDB."""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor

from m3backends.lmdb_compression import Compression, pack
from m3backends.lmdb_environment import Environment, Writing
from m3backends.lmdb_reading import LmdbReading
from m3backends.lmdb_records import digest, pack_id, pack_ids, pack_reference, pack_text, unpack_reference
from m3backends.lmdb_schema import Databases, create_folder, open_databases
from m3runtime.block import HEADER_BYTES, Ids, Rows, headers
from m3runtime.errors import InputError
from m3runtime.tier import Batch, check_rows


class LmdbHome(LmdbReading):
    """The home in a folder of its own, ``path``.

    ``slot_bytes`` is fixed when the folder is made; without it, what is there is opened. ``max_size`` bounds the file
    in bytes. With ``compression="zstd"`` new blocks are compressed where that makes them smaller; what is there can
    be read either way. Every method is one transaction (`embeddings`: one a batch), durable when it returns.
    Thread-safe. Other processes may read and write at the same time, one process must open a folder only once, and
    not use it across a fork.

    Raises `BankMissingError` if there is nothing to open, `BankFormatError` if another version wrote it,
    `BankMismatchError` if its slots are of another size, `BankError` if it is no bank or is damaged.
    """

    name = "lmdb"

    def __init__(
        self,
        *,
        path: str | os.PathLike[str],
        slot_bytes: int | None = None,
        max_size: int | None = None,
        compression: Compression = "none",
        read_only: bool = False,
    ) -> None:
        self.path = Path(path)
        self.compression = compression
        create_folder(self.path, slot_bytes, read_only)
        self._environment = Environment(
            self.path, databases=len(Databases._fields), max_size=max_size, read_only=read_only
        )
        try:
            self._db, self.slot_bytes = open_databases(self._environment, slot_bytes)
        except BaseException:
            self._environment.close()
            raise

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
        ids, count = batch.ids, len(batch.ids)
        stored, size = self._packed(ids, batch.blocks)
        vectors = np.ascontiguousarray(batch.embeddings, "<f4")
        if len(batch.references) != count or vectors.ndim != 2 or len(vectors) != count:
            raise InputError(
                f"a batch of {count} ids has {len(batch.references)} references, embeddings {vectors.shape}"
            )
        if len(np.unique(ids)) != count:
            raise InputError("a batch has an id twice")

        def work(txn: Writing) -> None:
            if replacing is not None:
                self._forget(txn, replacing)
            self._use(txn, ids)
            first = txn.cursor(self._db.embeddings)
            if count and first.first() and len(first.value()) != vectors[0].nbytes:
                raise InputError(f"embeddings have {vectors.shape[1]} numbers, those there {len(first.value()) // 4}")
            for row, (key, reference) in enumerate(zip(pack_ids(ids), batch.references, strict=True)):
                text, source = digest(reference.text), digest(reference.source)
                if not txn.put(text, key, overwrite=False, db=self._db.digests):
                    raise InputError(f"id {ids[row]}: its text is remembered already: {reference.text[:60]!r}")
                txn.put(key, stored[row], db=self._db.blocks)
                txn.put(key, pack_reference(reference), db=self._db.references)
                txn.put(source, pack_text(reference.source), overwrite=False, db=self._db.sources)
                txn.put(source, key, db=self._db.members)
                txn.put(key, vectors[row].data, db=self._db.embeddings)

        texts = sum(len(reference.text) + len(reference.source) for reference in batch.references)
        self._environment.write(work, need=size + vectors.nbytes + 4 * texts)

    def discard(self, ids: Ids) -> None:
        """Forget for good: block, reference, embedding and all; the ids are never used again."""
        self._environment.write(lambda txn: self._forget(txn, ids), reserve=True)

    def quarantine(self, id: int, reason: str) -> None:
        """See `Home.quarantine`. Passes over an id that is not held."""
        key = pack_id(id)

        def work(txn: Writing) -> None:
            if self._has(txn, key):
                txn.put(key, pack_text(reason), db=self._db.quarantine)

        self._environment.write(work, reserve=True)

    def set_meta(self, key: str, value: bytes) -> None:
        """See `Home.set_meta`. A key has 1 to 511 bytes."""

        def work(txn: Writing) -> None:
            txn.put(pack_text(key), value, db=self._db.meta)

        self._environment.write(work, need=len(value), reserve=True)

    def _packed(self, ids: Ids, blocks: Tensor) -> tuple[list[bytes | memoryview], int]:
        """What is stored of each block, and its bytes altogether. Raises `InputError` if the headers do not fit."""
        rows, ends = self._checked_blocks(ids, blocks)
        stored = [pack(rows[row, :end], self.compression) for row, end in enumerate(ends.tolist())]
        return stored, sum(len(one) for one in stored)

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

    def _forget(self, txn: Writing, ids: Ids) -> None:
        for key in pack_ids(ids):
            record = txn.pop(key, db=self._db.references)
            if record is not None:
                reference = unpack_reference(record)
                source = digest(reference.source)
                txn.delete(digest(reference.text), db=self._db.digests)
                txn.delete(source, key, db=self._db.members)
                if not txn.cursor(self._db.members).set_key(source):
                    txn.delete(source, db=self._db.sources)
            for db in (self._db.blocks, self._db.embeddings, self._db.quarantine):
                txn.delete(key, db=db)

    def _use(self, txn: Writing, ids: Ids) -> None:
        """Take these ids, which nobody used before."""
        next_id = int(txn.get(b"next_id", b"0", db=self._db.home))
        if len(ids):
            if int(ids.min()) < next_id:
                raise InputError(f"id {ids.min()} was used before; the next is {next_id}")
            txn.put(b"next_id", b"%d" % (int(ids.max()) + 1), db=self._db.home)
