"""`LmdbHome`: a bank's blocks, references and embeddings in LMDB."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb
import numpy as np
import numpy.typing as npt

from m3backends.batches import checked_embeddings, without_padding
from m3backends.lmdb.audit import audit
from m3backends.lmdb.compaction import copy_records, repacked
from m3backends.lmdb.compression import (
    ENOUGH,
    PLAIN,
    ZSTD,
    Compression,
    Packing,
    decide,
    load_dictionary,
)
from m3backends.lmdb.environment import Durability, Environment, ReadTransaction, WriteTransaction
from m3backends.lmdb.forgetting import expiries, forget
from m3backends.lmdb.placing import join, move, state
from m3backends.lmdb.reader import LmdbReader
from m3backends.lmdb.records import pack_id, pack_ids
from m3backends.lmdb.schema import (
    Databases,
    create_folder,
    open_databases,
    reopen_databases,
    state_schema,
    store_packing,
)
from m3backends.records import identity, pack_reference, pack_text
from m3runtime.config.units import Size
from m3runtime.documents.reference import Reference
from m3runtime.errors import InputError, TierReadOnlyError
from m3runtime.memory.block import Found, Ids, Rows
from m3runtime.storage.home import Batch, Changes, Damage
from m3runtime.storage.tier import check_ids

if TYPE_CHECKING:
    from torch import Tensor


class LmdbHome(LmdbReader):
    """The home in the folder ``path``, which holds nothing else.

    ``slot_bytes`` is fixed when the home is made; without it, an existing home is opened. ``max_size`` bounds the file
    in bytes. With ``compression="zstd"`` new blocks are compressed if the first `ENOUGH` blocks show that it saves
    space; existing blocks are read either way. Every method is one transaction (`embeddings`: one a batch).
    Thread-safe.

    ``durability`` is what a call survives once it returned. In every mode it survives that the process is killed.

    - ``full``: a power cut, too.
    - ``commit``: a power cut may undo the last calls, each wholly, and tears nothing.
    - ``relaxed``: a power cut may undo everything since the home was opened and, on a file system that writes in
      another order than it was told, tear the bank: it is verified when it is opened next, and must then be restored
      or written anew. Closing makes all durable.

    One process writes, with one open home; any number of others read with ``read_only=True`` at the same time, and see
    each commit as a whole. A home must not be used across a fork: it raises `TierError` then.

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
        self._reserving = threading.Lock()
        self._reserved = 0
        create_folder(self.path, slot_bytes, read_only)
        self._environment = Environment(
            self.path,
            databases=len(Databases._fields),
            max_size=max_size,
            read_only=read_only,
            durability=durability,
            reopened=self._reopen,
        )
        try:
            self._db, self.slot_bytes, self._above, self._packing = open_databases(self._environment, slot_bytes)
        except BaseException:
            self._environment.close()
            raise
        self._dictionary = load_dictionary(self._packing.dictionary) if self._packing else None

    def reserve(self, count: int) -> int:
        """Reserve ids; see `Home.reserve`. Nothing is stored, for no other process can write."""
        if self._environment.read_only:
            raise TierReadOnlyError(f"bank {self.path} was opened for reading")
        with self._reserving:
            first = max(self.next_id(), self._reserved)
            self._reserved = first + count
        return first

    def write(self, ids: Ids, blocks: "Tensor") -> None:
        """Store blocks without references: they can be read, and nothing will recall them.

        Ids that are held are passed over. Raises `InputError` for an id that was used and is no longer.
        """
        stored, size = self._packed(ids, blocks)

        def work(txn: WriteTransaction) -> None:
            new = [row for row, key in enumerate(pack_ids(ids)) if not self._has(txn, key)]
            self._use(txn, ids[new])
            for row in new:
                txn.put(pack_id(int(ids[row])), stored[row], overwrite=False, db=self._db.blocks)

        self._environment.write(work, need=size)

    def commit(self, batch: Batch, *, replacing: Ids | None = None, changes: Changes | None = None) -> None:
        """Add a batch in one transaction; see `Home.commit`."""
        stored, size = self._packed(batch.ids, batch.blocks)
        self._add(batch.ids, batch.references, batch.embeddings, stored, size, replacing, changes)

    def catalogue(
        self,
        ids: Ids,
        references: Sequence[Reference],
        embeddings: npt.NDArray[np.float32],
        *,
        changes: Changes | None = None,
    ) -> None:
        """Add cold references in one transaction; see `Home.catalogue`."""
        check_ids(ids)
        self._add(ids, references, embeddings, None, 0, None, changes)

    def change(self, changes: Changes) -> None:
        """Change places and states in one transaction; see `Home.change`."""

        def work(txn: WriteTransaction) -> None:
            state_schema(txn, self._db)
            move(txn, self._db, changes.places)
            state(txn, self._db, changes.states)

        self._environment.write(work, reserve=True)

    def fill(self, ids: Ids, blocks: "Tensor") -> Found:
        """Give cold ids their blocks in one transaction; see `Home.fill`."""
        stored, size = self._packed(ids, blocks)

        def work(txn: WriteTransaction) -> Found:
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
        changes: Changes | None,
    ) -> None:
        """Add references with the stored form of their blocks, ``size`` bytes; without it they are cold."""
        count = len(ids)
        vectors = checked_embeddings(ids, references, embeddings)
        changes = changes or Changes()

        def work(txn: WriteTransaction) -> None:
            if replacing is not None:
                forget(txn, self._db, replacing)
            state_schema(txn, self._db)
            move(txn, self._db, changes.places)
            self._use(txn, ids)
            if count:
                self._check_length(txn, vectors.shape[1])
            for row, (key, reference) in enumerate(zip(pack_ids(ids), references, strict=True)):
                if not self._db.digests.put(txn, identity(reference), key, overwrite=False):
                    raise InputError(f"id {ids[row]}: its text is remembered already: {reference.text[:60]!r}")
                if stored is None:
                    self._db.cold.put(txn, key, b"")
                else:
                    txn.put(key, stored[row], db=self._db.blocks)
                self._db.references.put(txn, key, pack_reference(reference))
                for expiry in expiries(key, reference):
                    self._db.expiring.put(txn, expiry, b"")
                self._db.embeddings.put(txn, key, vectors[row].tobytes())
            members: dict[str, list[int]] = {}
            for id, reference in zip(ids.tolist(), references, strict=True):
                for name in reference.sources:
                    members.setdefault(name, []).append(id)
            join(txn, self._db, members)
            state(txn, self._db, changes.states)

        texts = sum(len(pack_reference(reference)) for reference in references)
        self._environment.write(work, need=size + vectors.nbytes + 4 * texts)

    def discard(self, ids: Ids) -> None:
        """Forget for good: block, reference, embedding and all; the ids are never used again."""
        self._environment.write(lambda txn: forget(txn, self._db, ids), reserve=True)

    def quarantine(self, id: int, reason: str) -> None:
        """Quarantine a bad block; an id that has no block and is not cold is passed over."""
        key = pack_id(id)

        def work(txn: WriteTransaction) -> None:
            if self._has(txn, key) or self._db.cold.has(txn, key):
                self._db.quarantine.put(txn, key, pack_text(reason))

        self._environment.write(work, reserve=True)

    def set_meta(self, key: str, value: bytes) -> None:
        """Store a small value durably under a key of 1 to 511 bytes."""

        def work(txn: WriteTransaction) -> None:
            self._db.meta.put(txn, pack_text(key), value)

        self._environment.write(work, need=len(value), reserve=True)

    def widen(self, slot_bytes: int) -> None:
        """Make slots larger; see `Home.widen`."""
        if slot_bytes < self.slot_bytes:
            raise InputError(f"slots of {self.slot_bytes} bytes cannot become slots of {slot_bytes}")
        self._environment.write(lambda txn: self._db.home.put(txn, b"slot_bytes", b"%d" % slot_bytes), reserve=True)
        self.slot_bytes = slot_bytes

    def compact(self) -> None:
        """Copy all records into a new file, which takes the place of the old one; see `Home.compact`.

        Calls of other threads wait for it. It takes up to as much room on the drive as the file has. Processes that
        read go on to the new file at their next call.
        """

        def fill(env: lmdb.Environment, new: Path) -> None:
            rewrite = repacked(env, self._db, self.slot_bytes, self._packing or PLAIN)
            copy_records(env, new, self._db, rewrite)

        self._environment.replace(fill)

    def _reopen(self) -> None:
        self._db, self._packing = reopen_databases(self._environment, self.slot_bytes)
        self._dictionary = load_dictionary(self._packing.dictionary) if self._packing else None

    def audit(self, progress: Callable[[int, int], None] | None = None) -> Iterator[Damage]:
        """Audit pages and records, as `Home.audit` says; the pages not while another process has the home for writing.

        Its steps are records. It takes bounded memory and two bytes for each page of the file.
        """
        return audit(self._environment, self._db, progress)

    def _packed(self, ids: Ids, blocks: "Tensor") -> tuple[list[bytes | memoryview], int]:
        """The stored form of each block, and their bytes altogether. Raises `InputError` if the headers do not fit."""
        own = without_padding(ids, blocks, self.slot_bytes)
        pack = self._how_to_pack(own).packer()
        stored = [pack(block) for block in own]
        return stored, sum(len(one) for one in stored)

    def _how_to_pack(self, blocks: list[Rows]) -> Packing:
        """The packing of this home, decided and stored now if these blocks and the stored ones are enough for that."""
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
        def work(txn: ReadTransaction) -> list[Rows]:
            stored = islice(txn.cursor(self._db.blocks).iternext(keys=False), max(0, count))
            return [self._unpack(txn, block).copy() for block in stored]

        return self._environment.read(work)

    def _check_length(self, txn: WriteTransaction, dim: int) -> None:
        """Raise `InputError` unless embeddings of this length fit the stored ones."""
        first = txn.cursor(self._db.embeddings.handle)
        if first.first():
            stored = len(self._db.embeddings.open(first.key(), first.value())) // 4
            if stored != dim:
                raise InputError(f"embeddings have {dim} numbers, the stored ones {stored}")

    def _use(self, txn: WriteTransaction, ids: Ids) -> None:
        """Take these ids. Raises `InputError` if one was used before."""
        if len(ids):
            if int(ids.min()) < (next_id := self._next_id(txn)):
                raise InputError(f"id {ids.min()} was used before; the next is {next_id}")
            above = int(ids.max()) + 1
            self._db.home.put(txn, b"next_id", b"%d" % above)
            if passed_over := above - next_id - len(np.unique(ids)):
                self._db.home.put(txn, b"unused", b"%d" % (self._unused(txn) + passed_over))
