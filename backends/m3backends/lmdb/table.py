"""`RecordTable`: a database of an LMDB home whose records are sealed. A read returns what was written, or raises."""

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from m3backends.lmdb.environment import ReadTransaction, WriteTransaction
from m3backends.lmdb.records import SEAL_BYTES, seal, unpack_ids
from m3runtime.errors import BankFullError, RecordError
from m3runtime.memory.block import Ids

if TYPE_CHECKING:
    import lmdb

T = TypeVar("T")


class RecordTable:
    """One database. Its methods work within a transaction, and the memoryviews that they return end with it."""

    def __init__(self, bank: Path, name: str, handle: "lmdb._Database | None", *, by_id: bool) -> None:
        """``handle`` is None for a database that the home lacks: it is empty and full."""
        self.name = name
        self._handle = handle
        self._bank = bank
        self._by_id = by_id

    @property
    def exists(self) -> bool:
        """Does the home have this database?"""
        return self._handle is not None

    @property
    def handle(self) -> "lmdb._Database":
        """LMDB's handle. Raises `BankFullError` if the home lacks the database, for which it had no room."""
        if self._handle is None:
            raise BankFullError(f"bank {self._bank} is full: it has no room for its records of {self.name}")
        return self._handle

    def get(self, txn: ReadTransaction | WriteTransaction, key: bytes) -> memoryview | None:
        """The value, or None. Raises `RecordError` if the record is damaged."""
        if not self.exists:
            return None
        stored = txn.get(key, db=self.handle)
        return None if stored is None else self.open(key, stored)

    def has(self, txn: ReadTransaction | WriteTransaction, key: bytes) -> bool:
        """Is there a record, sound or not? A cursor, unlike `get`, does not read it."""
        return self.exists and txn.cursor(self.handle).set_key(key)

    def read(self, txn: ReadTransaction | WriteTransaction, key: bytes, unpack: Callable[[memoryview], T]) -> T | None:
        """The value as ``unpack`` reads it, or None. Raises `RecordError` also where ``unpack`` raises `ValueError`."""
        value = self.get(txn, key)
        return None if value is None else self.unpack(key, value, unpack)

    def put(
        self,
        txn: WriteTransaction,
        key: bytes,
        value: bytes | memoryview,
        *,
        overwrite: bool = True,
        append: bool = False,
    ) -> bool:
        """Seal and store; false, with nothing changed, if there is a record that may not be overwritten."""
        sealed = b"".join((seal(self.name, key, value), value))
        return txn.put(key, sealed, overwrite=overwrite, append=append, db=self.handle)

    def delete(self, txn: WriteTransaction, key: bytes) -> bool:
        """Remove the record, sound or not; false if there is none."""
        return self.exists and txn.delete(key, db=self.handle)

    def items(
        self, txn: ReadTransaction | WriteTransaction, unpack: Callable[[memoryview], T], start: bytes = b""
    ) -> Iterator[tuple[bytes, T]]:
        """All keys from ``start`` on in order, with their values. Raises `RecordError` at a damaged one."""
        cursor = txn.cursor(self.handle)
        if cursor.set_range(start):
            for key, stored in cursor:
                yield bytes(key), self.unpack(key, self.open(key, stored), unpack)

    def count(self, txn: ReadTransaction | WriteTransaction) -> int:
        """The number of records."""
        if not self.exists:
            return 0
        return txn.stat(self.handle)["entries"]

    def ids(self, txn: ReadTransaction | WriteTransaction, start: bytes = b"", most: int | None = None) -> Ids:
        """The keys from ``start`` on as ids, or ``most`` of them; no value is read.

        Raises `RecordError` if a key is no id.
        """
        if not self.exists:
            return unpack_ids(())
        cursor = txn.cursor(self.handle)
        try:
            return unpack_ids(islice(cursor.iternext(values=False), most) if cursor.set_range(start) else ())
        except ValueError as error:
            raise RecordError(f"bank {self._bank}: {self.name} is damaged: {error}") from error

    def open(self, key: bytes | memoryview, stored: bytes | memoryview) -> memoryview:
        """The value of a stored record, after its seal was checked. Raises `RecordError`."""
        value = memoryview(stored)[SEAL_BYTES:]
        if self._by_id and len(key) != 8:
            raise self.damaged(key, "its key is no id")
        if seal(self.name, key, value) != stored[:SEAL_BYTES]:
            raise self.damaged(key, "its digest does not match")
        return value

    def unpack(self, key: bytes | memoryview, value: memoryview, unpack: Callable[[memoryview], T]) -> T:
        """The value as ``unpack`` reads it. Raises `RecordError` where ``unpack`` raises `ValueError`."""
        try:
            return unpack(value)
        except ValueError as error:
            raise self.damaged(key, str(error)) from error

    def damaged(self, key: bytes | memoryview, why: str) -> RecordError:
        """The error that names a damaged record."""
        id = int.from_bytes(key, "big") if self._by_id and len(key) == 8 else None
        shown = str(id) if id is not None else ascii(bytes(key[:20]))[2:-1]
        return RecordError(f"bank {self._bank}: the record of {shown} in {self.name} is damaged: {why}", id)


def go_behind(cursor: "lmdb.Cursor[memoryview]", last: tuple[bytes, bytes] | None, *, duplicates: bool) -> bool:
    """Move behind the record of a key and value, which may be gone, or to the first; false if none follows.

    Only with ``duplicates``, of a database that has several values of a key, does the value matter.
    """
    if last is None:
        return cursor.first()
    key, value = last
    if duplicates and cursor.set_range_dup(key, value + b"\0"):
        return True
    if not cursor.set_range(key):
        return False
    return cursor.next_nodup() if bytes(cursor.key()) == key else True
