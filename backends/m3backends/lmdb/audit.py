"""The audit of a home's records: is every one sound, and do all agree with each other?"""

from collections.abc import Callable, Iterator
from typing import Literal, TypeVar

import lmdb
import numpy as np

from m3backends.lmdb.environment import Environment, ReadTransaction
from m3backends.lmdb.forgetting import expiries, members_of
from m3backends.lmdb.records import (
    SEAL_BYTES,
    pack_id,
    unpack_id,
    unpack_number,
    unpack_source,
)
from m3backends.lmdb.schema import Databases, above_all
from m3backends.lmdb.structure import structure_problems
from m3backends.lmdb.table import RecordTable, go_behind
from m3backends.records import digest, identity, unpack_reference, unpack_state, unpack_text
from m3runtime.documents.reference import Reference
from m3runtime.errors import RecordError
from m3runtime.storage.home import Damage

T = TypeVar("T")

_BATCH = 1024
"""Records read in one transaction: while it lasts, a writer cannot reuse the pages that it frees."""
_UNIT = 1e-3
"""How far the length of an embedding may be from 1."""

Defects = Iterator[tuple[int | None, str]]
"""The defects of a record: the id concerned, and a description."""


def audit(environment: Environment, db: Databases, progress: Callable[[int, int], None] | None) -> Iterator[Damage]:
    """All damage in the records of a home; see `LmdbHome.audit`."""
    for problem in environment.at_rest(lambda: structure_problems(environment.files.data)) or ():
        yield Damage("home", None, f"the structure of {environment.files.data.name} is damaged: {problem}")
    books = _Books(db)
    walks = [
        _Walk("home", db.home.handle, books.home),
        _Walk("reference", db.references.handle, books.reference),
        _Walk("home", db.digests.handle, books.text),
        _Walk("home", db.members, books.member, duplicates=True),
        _Walk("home", db.sources.handle, books.source),
        _Walk("embedding", db.embeddings.handle, books.embedding),
        _Walk("block", db.blocks, books.block),
        _Walk("home", db.quarantine.handle, books.quarantined),
        _Walk("home", db.meta.handle, books.meta),
    ]
    if db.cold.exists:
        walks.append(_Walk("home", db.cold.handle, books.cold))
    if db.states.exists:
        walks.append(_Walk("home", db.states.handle, books.state))
    if db.expiring.exists:
        walks.append(_Walk("home", db.expiring.handle, books.expiring))
    steps = environment.read(lambda txn: sum(txn.stat(walk.database)["entries"] for walk in walks))
    done = 0
    for walk in walks:
        while not walk.done:
            damages, looked = environment.read(walk.step)
            done += looked
            yield from damages
            if progress is not None:
                progress(min(done, steps), steps)  # a writer may add some


class _Walk:
    """Reads the records of one database in order, a batch at a time."""

    def __init__(
        self,
        where: str,
        database: "lmdb._Database",
        look: Callable[[ReadTransaction, bytes, memoryview], Defects],
        *,
        duplicates: bool = False,
    ) -> None:
        self.database = database
        self._duplicates = duplicates
        self.done = False
        self._where = where
        self._look = look
        self._last: tuple[bytes, bytes] | None = None

    def step(self, txn: ReadTransaction) -> tuple[list[Damage], int]:
        """Read the next batch. Returns its defects and its number of records."""
        cursor, damages, looked = txn.cursor(self.database), list[Damage](), 0
        there = go_behind(cursor, self._last, duplicates=self._duplicates)
        while there and looked < _BATCH:
            key, value = bytes(cursor.key()), cursor.value()
            damages += [Damage(self._where, id, what) for id, what in self._look(txn, key, value)]
            probe = txn.cursor(self.database)
            if not (probe.set_key_dup(key, value) if self._duplicates else probe.set_key(key)):
                damages.append(Damage(self._where, _id(key), f"{ascii(key)[2:-1]} does not lead to its own record"))
            looked += 1
            self._last = key, bytes(value) if self._duplicates else b""
            there = cursor.next()
        self.done = not there
        return damages, looked


class _Books:
    """The rules of each kind of record, and of the records that must exist with it."""

    def __init__(self, db: Databases) -> None:
        self._db = db
        self._dim: int | None = None

    def home(self, txn: ReadTransaction, key: bytes, stored: memoryview) -> Defects:
        if key == b"version":
            return
        if not _sound(self._db.home, key, stored):
            yield None, f"the record {ascii(key)[2:-1]} is damaged"
        elif key == b"next_id":
            next_id, above = self._db.home.read(txn, key, unpack_number), above_all(txn, self._db)
            if next_id is not None and next_id < above:
                yield None, f"the next id is {next_id}, and {above - 1} is in use"

    def reference(self, txn: ReadTransaction, key: bytes, stored: memoryview) -> Defects:
        id, reference = _id(key), _read(self._db.references, key, stored, unpack_reference)
        if reference is None:
            yield id, "its record is damaged"
            return
        try:
            of_text = self._db.digests.read(txn, identity(reference), unpack_id)
            if of_text != id:
                yield id, f"its text stands for {of_text}"
        except RecordError:
            yield id, "the record of its text's digest is damaged"
        for source in reference.sources:
            if not txn.cursor(self._db.members).set_key_dup(digest(source), key):
                yield id, "its source does not list it"
        if not all(self._db.expiring.has(txn, expiry) for expiry in expiries(key, reference)):
            yield id, "it expires and is not listed so"
        if not _has(txn, self._db.embeddings.handle, key):
            yield id, "it has no embedding"
        if not (_has(txn, self._db.blocks, key) or self._db.cold.has(txn, key)):
            yield id, "it has no block"

    def text(self, txn: ReadTransaction, key: bytes, stored: memoryview) -> Defects:
        id = _read(self._db.digests, key, stored, unpack_id)
        if id is None:
            yield None, f"the record of the text with digest {key.hex()[:16]} is damaged"
        elif (one := self._reference(txn, pack_id(id))) != "damaged" and (one is None or identity(one) != key):
            yield id, "there is a text for it and no reference" if one is None else "there is another text for it"

    def member(self, txn: ReadTransaction, key: bytes, member: memoryview) -> Defects:
        id = _id(member)
        if id is None or not _has(txn, self._db.sources.handle, key):
            yield id, f"it is listed by the source with digest {key.hex()[:16]}, which is unknown"
        elif (one := self._reference(txn, bytes(member))) != "damaged" and (
            one is None or key not in map(digest, one.sources)
        ):
            yield id, "a source lists it and it has no reference" if one is None else "another source lists it"

    def source(self, txn: ReadTransaction, key: bytes, stored: memoryview) -> Defects:
        known, members = _read(self._db.sources, key, stored, unpack_source), members_of(txn, self._db, key)
        if known is None or digest(known.name) != key:
            # By one of its members: to compute that memory anew writes the record anew.
            id = int(members[0]) if len(members) else None
            yield id, f"the record of the source with digest {key.hex()[:16]} is damaged"
        elif not known.fits(members):
            yield None, f"source {known.name} does not list the {known.count} references that it counts"

    def embedding(self, txn: ReadTransaction, key: bytes, stored: memoryview) -> Defects:
        id = _id(key)
        if not _sound(self._db.embeddings, key, stored) or (len(stored) - SEAL_BYTES) % 4:
            yield id, "its record is damaged"
            return
        vector = np.frombuffer(stored[SEAL_BYTES:], "<f4")
        self._dim = self._dim or len(vector)
        length = float(np.linalg.norm(vector.astype(np.float64)))
        if len(vector) != self._dim:
            yield id, f"it has {len(vector)} numbers, and others {self._dim}"
        elif not abs(length - 1) <= _UNIT:  # also where it is not finite
            yield id, f"its length is {length:.4g}, not 1"
        if not _has(txn, self._db.references.handle, key):
            yield id, "it has no reference"

    def block(self, _: ReadTransaction, key: bytes, __: memoryview) -> Defects:
        if _id(key) is None:
            yield None, f"there is one under {key.hex()[:16]}, which is no id"

    def quarantined(self, txn: ReadTransaction, key: bytes, stored: memoryview) -> Defects:
        if _read(self._db.quarantine, key, stored, unpack_text) is None:
            yield _id(key), "the record of its quarantine is damaged"
        elif not (_has(txn, self._db.blocks, key) or self._db.cold.has(txn, key)):
            yield _id(key), "it is quarantined and has no block"

    def cold(self, txn: ReadTransaction, key: bytes, stored: memoryview) -> Defects:
        id = _id(key)
        if id is None or not _sound(self._db.cold, key, stored) or len(stored) != SEAL_BYTES:
            yield id, "the record that it is cold is damaged"
        elif _has(txn, self._db.blocks, key):
            yield id, "it is cold and has a block"
        elif not _has(txn, self._db.references.handle, key):
            yield id, "it is cold and has no reference"

    def expiring(self, txn: ReadTransaction, key: bytes, stored: memoryview) -> Defects:
        id = _id(key[-8:])
        if not _sound(self._db.expiring, key, stored) or len(stored) != SEAL_BYTES:
            yield id, "the record of its last day is damaged"
        elif (one := self._reference(txn, key[-8:])) != "damaged" and (
            one is None or key not in expiries(key[-8:], one)
        ):
            yield id, "it is listed under a last day that it does not have"

    def meta(self, _: ReadTransaction, key: bytes, stored: memoryview) -> Defects:
        if not _sound(self._db.meta, key, stored):
            yield None, f"the record {ascii(key)[2:-1]} of meta is damaged"

    def state(self, _: ReadTransaction, key: bytes, stored: memoryview) -> Defects:
        known = _read(self._db.states, key, stored, unpack_state)
        if known is None or digest(known[0]) != key:
            yield None, f"the state of the source with digest {key.hex()[:16]} is damaged"

    def _reference(self, txn: ReadTransaction, key: bytes) -> "Reference | Literal['damaged'] | None":
        """The reference of an id, if there is any."""
        try:
            return self._db.references.read(txn, key, unpack_reference)
        except RecordError:
            return "damaged"


def _read(table: RecordTable, key: bytes, stored: memoryview, unpack: Callable[[memoryview], T]) -> T | None:
    """The value of a record, or None if it is damaged."""
    try:
        return table.unpack(key, table.open(key, stored), unpack)
    except RecordError:
        return None


def _sound(table: RecordTable, key: bytes, stored: memoryview) -> bool:
    return _read(table, key, stored, bool) is not None


def _has(txn: ReadTransaction, database: "lmdb._Database", key: bytes) -> bool:
    return txn.cursor(database).set_key(key)


def _id(key: bytes | memoryview) -> int | None:
    return int.from_bytes(key, "big") if len(key) == 8 else None
