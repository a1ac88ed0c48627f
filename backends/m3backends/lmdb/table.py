"""A database of an LMDB home whose records are sealed: what is read is what was written, or an error."""

# ruff: noqa: ARG002 - what is absent takes the arguments of what is there

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from m3backends.lmdb.environment import Reading, Writing
from m3backends.lmdb.records import SEAL_BYTES, seal, unpack_ids
from m3runtime.errors import BankFullError, RecordError
from m3runtime.memory.block import Ids

if TYPE_CHECKING:
    import lmdb

T = TypeVar("T")


class Table:
    """One database; its methods work within a transaction, whose memory what they return must not outlive."""

    def __init__(self, bank: Path, name: str, handle: "lmdb._Database", *, by_id: bool) -> None:
        self.name = name
        self.handle = handle
        self._bank = bank
        self._by_id = by_id

    def get(self, txn: Reading | Writing, key: bytes) -> memoryview | None:
        """The value, or None. Raises `RecordError` if the record is damaged."""
        stored = txn.get(key, db=self.handle)
        return None if stored is None else self.open(key, stored)

    def has(self, txn: Reading | Writing, key: bytes) -> bool:
        """Whether there is a record, in whatever state: a cursor, unlike `get`, does not read it."""
        return txn.cursor(self.handle).set_key(key)

    def read(self, txn: Reading | Writing, key: bytes, unpack: Callable[[memoryview], T]) -> T | None:
        """What ``unpack`` makes of the value, or None. Raises `RecordError` also where it raises `ValueError`."""
        value = self.get(txn, key)
        return None if value is None else self.unpack(key, value, unpack)

    def put(
        self, txn: Writing, key: bytes, value: bytes | memoryview, *, overwrite: bool = True, append: bool = False
    ) -> bool:
        """Seal and store; false, and nothing changed, where there is a record that may not be overwritten."""
        sealed = b"".join((seal(self.name, key, value), value))
        return txn.put(key, sealed, overwrite=overwrite, append=append, db=self.handle)

    def delete(self, txn: Writing, key: bytes) -> bool:
        """Remove the record, whatever its state; false if there is none."""
        return txn.delete(key, db=self.handle)

    def items(
        self, txn: Reading | Writing, unpack: Callable[[memoryview], T], start: bytes = b""
    ) -> Iterator[tuple[bytes, T]]:
        """All keys from ``start`` on in order, with their values. Raises `RecordError` at one that is damaged."""
        cursor = txn.cursor(self.handle)
        if cursor.set_range(start):
            for key, stored in cursor:
                yield bytes(key), self.unpack(key, self.open(key, stored), unpack)

    def count(self, txn: Reading | Writing) -> int:
        """How many records there are."""
        return txn.stat(self.handle)["entries"]

    def ids(self, txn: Reading | Writing) -> Ids:
        """All keys as ids. The values are not read. Raises `RecordError` where a key is no id."""
        try:
            return unpack_ids(txn.cursor(self.handle).iternext(values=False))
        except ValueError as error:
            raise RecordError(f"bank {self._bank}: {self.name} is damaged: {error}") from error

    def open(self, key: bytes | memoryview, stored: bytes | memoryview) -> memoryview:
        """The value of a record, whose seal is checked. Raises `RecordError`."""
        value = memoryview(stored)[SEAL_BYTES:]
        if self._by_id and len(key) != 8:
            raise self.damaged(key, "its key is no id")
        if seal(self.name, key, value) != stored[:SEAL_BYTES]:
            raise self.damaged(key, "its digest does not match")
        return value

    def unpack(self, key: bytes | memoryview, value: memoryview, unpack: Callable[[memoryview], T]) -> T:
        """What ``unpack`` makes of a value. Raises `RecordError` where it raises `ValueError`."""
        try:
            return unpack(value)
        except ValueError as error:
            raise self.damaged(key, str(error)) from error

    def damaged(self, key: bytes | memoryview, why: str) -> RecordError:
        """The error for a damaged record, which names it."""
        id = int.from_bytes(key, "big") if self._by_id and len(key) == 8 else None
        shown = str(id) if id is not None else ascii(bytes(key[:20]))[2:-1]
        return RecordError(f"bank {self._bank}: the record of {shown} in {self.name} is damaged: {why}", id)


class Absent(Table):
    """A database that a home of an earlier release does not have: it is empty, and nothing can be put there."""

    def __init__(self, bank: Path, name: str) -> None:
        self.name = name
        self._bank = bank
        self._by_id = True

    def get(self, txn: Reading | Writing, key: bytes) -> memoryview | None:
        """None."""
        return None

    def has(self, txn: Reading | Writing, key: bytes) -> bool:
        """False."""
        return False

    def put(
        self, txn: Writing, key: bytes, value: bytes | memoryview, *, overwrite: bool = True, append: bool = False
    ) -> bool:
        """Raises `BankFullError`: opening the home for writing makes the database, unless there is no room for it."""
        raise BankFullError(f"bank {self._bank} is full: there is no room for its records of {self.name} references")

    def delete(self, txn: Writing, key: bytes) -> bool:
        """False."""
        return False

    def count(self, txn: Reading | Writing) -> int:
        """None."""
        return 0

    def ids(self, txn: Reading | Writing) -> Ids:
        """None."""
        return unpack_ids(())
