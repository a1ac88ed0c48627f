"""The schema of an LMDB home: its databases, and how they are made and opened.

==========  ==========================  =============================================================
database    key                         value
==========  ==========================  =============================================================
home        ``version``                 the schema, 2 or 3, and nothing else: every release can read it
home        ``slot_bytes``              *sealed* decimal
home        ``next_id``                 *sealed* decimal
home        ``unused``                  *sealed* decimal: the ids below ``next_id`` that were passed over, if any
home        ``packing``                 *sealed* ``none``, ``zstd`` or ``dictionary``: see `Packing`
home        ``dictionary``              *sealed* dictionary of zstd
blocks      id                          exactly the block's bytes, not the slot, or a zstd frame of them
references  id                          *sealed* JSON of text, tokens, heading, places
digests     digest of heading and text  *sealed* id
sources     digest of the source        *sealed* count and sum of its ids, 8 bytes each, and its name
members     digest of the source        ids, sorted
states      digest of the source        *sealed* JSON of its name and the fields of its state
expiring    last day, id                *sealed* nothing: the reference has a place with this last day
embeddings  id                          *sealed* float32, little-endian
quarantine  id                          *sealed* reason
cold        id                          *sealed* nothing: a reference that has no block yet
meta        any                         *sealed* any
==========  ==========================  =============================================================

Ids have 8 bytes, big-endian. Digests are BLAKE2b of UTF-8, 32 bytes: see `m3backends.lmdb.records`. A sealed value
follows 8 bytes of XXH3-64 over the database's name, a zero byte, the key's length (16 bits), the key and the value.

The schema is not the bank's format, which its manifest states. Schema 2 has one place for each reference, and its
records of references are JSON of text, source, start, end, tokens. They stay as they are: a home becomes schema 3 when
the first reference of the later form is written. A home of an earlier release lacks `cold`, `states` or
`expiring`: opening it for writing adds the databases, and for readers nothing is cold, no state is known and nothing
expires.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, cast, get_args

import lmdb

from m3backends.lmdb.compression import Method, Packing, load_dictionary
from m3backends.lmdb.environment import Environment, ReadTransaction, WriteTransaction
from m3backends.lmdb.records import unpack_id, unpack_number
from m3backends.lmdb.table import RecordTable
from m3backends.records import unpack_text
from m3runtime.errors import (
    BankError,
    BankFormatError,
    BankFullError,
    BankMismatchError,
    BankMissingError,
    RecordError,
    TierError,
)
from m3runtime.storage.files import sync_folder

SCHEMA = 3
_READABLE = (2, SCHEMA)
_LARGEST_SLOT = 64 + 2**32
_BY_ID = ("references", "embeddings", "quarantine", "cold")
_UNSEALED = ("blocks", "members")
_LATER = ("cold", "states", "expiring")
"""Missing in homes of earlier releases."""


class Databases(NamedTuple):
    """All databases of a home by name."""

    home: RecordTable
    blocks: "lmdb._Database"
    references: RecordTable
    digests: RecordTable
    sources: RecordTable
    members: "lmdb._Database"
    embeddings: RecordTable
    quarantine: RecordTable
    meta: RecordTable
    cold: RecordTable
    states: RecordTable
    expiring: RecordTable


class Opened(NamedTuple):
    """The databases and fixed facts of an open home."""

    databases: Databases
    slot_bytes: int
    above: int
    """The id above the last that has a sound record."""
    packing: Packing | None
    """The decision about compression, if it was taken."""


def create_folder(path: Path, slot_bytes: int | None, read_only: bool) -> None:
    """Make the folder of a new home; LMDB makes the files. Raises `BankMissingError` or `BankError`."""
    try:
        if path.exists() and not path.is_dir():
            raise BankError(f"{path} is not the folder of a bank")
        if os.path.lexists(path / "data.mdb"):
            return
        if read_only or slot_bytes is None:
            raise BankMissingError(f"there is no bank at {path}")
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BankError(f"bank {path}: {error}") from error


def open_databases(environment: Environment, slot_bytes: int | None) -> Opened:
    """Open the databases, or make all of them in one transaction. Raises the errors of `LmdbHome`."""
    path = environment.path
    there = environment.read(lambda txn: {bytes(name) for name in txn.cursor().iternext(values=False)})
    if there and b"home" not in there:
        raise BankError(f"{environment.files.data} belongs to another program")
    if not there and (environment.read_only or slot_bytes is None):
        raise BankMissingError(f"there is no bank at {path}")

    def make(txn: WriteTransaction) -> Databases:
        databases = _open_all(environment, txn, set())
        if txn.put(b"version", b"%d" % SCHEMA, overwrite=False, db=databases.home.handle):
            databases.home.put(txn, b"slot_bytes", b"%d" % (slot_bytes or 0))
            databases.home.put(txn, b"next_id", b"0")
        return databases

    def look(txn: ReadTransaction) -> Opened:
        _check_schema(txn, databases, path)
        slot, next_id = (databases.home.read(txn, key, unpack_number) for key in (b"slot_bytes", b"next_id"))
        if slot is None or next_id is None or slot > _LARGEST_SLOT or next_id > 2**64:
            raise ValueError(f"it states slots of {slot} bytes and {next_id} as the next id")
        if (unused := databases.home.read(txn, b"unused", unpack_number) or 0) > next_id:
            raise ValueError(f"it states that {unused} ids below {next_id} were passed over")
        if environment.is_doubtful:
            _check_findable(txn, databases)
        return Opened(databases, slot, above_all(txn, databases), _packing(txn, databases))

    try:
        databases = _open_all(environment, None, there) if there else environment.write(make)
        opened = environment.read(look)
    except (lmdb.Error, ValueError, TierError) as error:
        raise BankError(f"bank {environment.files.data} is damaged: {error}") from error
    environment.confirm()
    if slot_bytes not in (None, opened.slot_bytes):
        raise BankMismatchError(f"bank {path} has slots of {opened.slot_bytes} bytes, not {slot_bytes}")
    if not environment.read_only and not all(getattr(opened.databases, name).exists for name in _LATER):
        with suppress(BankFullError):  # without room for them the home opens all the same
            later = environment.write(lambda txn: _open_later(environment, txn), reserve=True)
            opened = opened._replace(databases=opened.databases._replace(**later))  # type: ignore[arg-type]
    if not there:  # LMDB syncs the file, not the folders that name it
        sync_folder(path)
        sync_folder(path.parent)
    return opened


def reopen_databases(environment: Environment, slot_bytes: int) -> tuple[Databases, Packing | None]:
    """Open the databases again, and read the packing, when another file took the place of the one that was open.

    Raises `BankError` if it is damaged or another bank.
    """
    try:
        with environment.env.begin() as txn:
            there = {bytes(name) for name in txn.cursor().iternext(values=False)}
        databases = _open_all(environment, None, there)
        with environment.env.begin(buffers=True) as txn:
            if environment.is_doubtful:
                _check_findable(txn, databases)
            if (databases.home.read(txn, b"slot_bytes", unpack_number) or 0) < slot_bytes:  # they may have been widened
                raise ValueError("another bank took its place")
            packing = _packing(txn, databases)
    except (lmdb.Error, ValueError, TierError) as error:
        raise BankError(f"bank {environment.files.data} cannot be opened again: {error}") from error
    environment.confirm()
    return databases, packing


def state_schema(txn: WriteTransaction, databases: Databases) -> None:
    """State that the home has records which earlier releases cannot read."""
    if unpack_number(txn.get(b"version", b"", db=databases.home.handle)) != SCHEMA:
        txn.put(b"version", b"%d" % SCHEMA, db=databases.home.handle)


def store_packing(txn: WriteTransaction, databases: Databases, packing: Packing) -> None:
    """Record how new blocks are packed."""
    databases.home.put(txn, b"packing", packing.method.encode())
    if packing.dictionary:
        databases.home.put(txn, b"dictionary", packing.dictionary)


def _packing(txn: ReadTransaction, databases: Databases) -> Packing | None:
    method = databases.home.read(txn, b"packing", unpack_text)
    dictionary = databases.home.read(txn, b"dictionary", bytes) or b""
    if method not in (None, *get_args(Method)) or (method == "dictionary") != bool(dictionary):
        raise ValueError(f"it states {method!r} as its packing, with {len(dictionary)} bytes of a dictionary")
    load_dictionary(dictionary)
    return None if method is None else Packing(cast(Method, method), dictionary)


def _open_all(environment: Environment, txn: WriteTransaction | None, there: set[bytes]) -> Databases:
    """Open the databases, whose names are ``there``, or make them with ``txn``.

    Raises `lmdb.Error`, and `ValueError` for a database of other properties.
    """
    opened = dict[str, RecordTable | lmdb._Database]()
    # LMDB drops handles that were opened in a transaction which did not commit, as one that only reads.
    for name in Databases._fields:
        by_id = name in _BY_ID
        if name in _LATER and txn is None and name.encode() not in there:
            opened[name] = RecordTable(environment.path, name, None, by_id=by_id)
            continue
        handle = environment.env.open_db(name.encode(), txn, dupsort=name == "members", create=txn is not None)
        if {flag for flag, on in handle.flags().items() if on} != ({"dupsort"} if name == "members" else set()):
            raise ValueError(f"{name} has other properties")
        opened[name] = handle if name in _UNSEALED else RecordTable(environment.path, name, handle, by_id=by_id)
    return Databases(**opened)  # type: ignore[arg-type]


def _open_later(environment: Environment, txn: WriteTransaction) -> dict[str, RecordTable]:
    """Open the databases that homes of earlier releases lack, or make them."""
    handles = {name: environment.env.open_db(name.encode(), txn) for name in _LATER}
    return {name: RecordTable(environment.path, name, of, by_id=name in _BY_ID) for name, of in handles.items()}


def _check_schema(txn: ReadTransaction, databases: Databases, path: Path) -> None:
    schema = unpack_number(txn.get(b"version", b"", db=databases.home.handle))
    if schema not in _READABLE:
        mend = "install a newer m3runtime" if schema > SCHEMA else "write the bank anew"
        raise BankFormatError(f"bank {path}: its LMDB home has schema {schema}, this release reads {SCHEMA}; {mend}")


def _check_findable(txn: ReadTransaction, databases: Databases) -> None:
    """Raise `ValueError` for a record that a walk finds and its key does not: damaged branches of a tree cause that."""
    for name, one in databases._asdict().items():
        if isinstance(one, RecordTable) and not one.exists:
            continue
        handle = one.handle if isinstance(one, RecordTable) else one
        walk, probe = txn.cursor(handle), txn.cursor(handle)
        while walk.next():  # at first to the first
            key = walk.key()
            if not (probe.set_key_dup(key, walk.value()) if name == "members" else probe.set_key(key)):
                raise ValueError(f"{name} has a record that its key, {key.hex()[:20]}, does not lead to")


def above_all(txn: ReadTransaction, databases: Databases) -> int:
    """The id above the last key of a sound record, whatever ``next_id`` says."""
    above = 0
    for table in (databases.references, databases.embeddings, databases.quarantine):
        cursor = txn.cursor(table.handle)
        there = cursor.last()
        while there:
            key = cursor.key()
            with suppress(RecordError, ValueError):  # a flipped bit can make any key the largest
                table.open(key, cursor.value())
                above = max(above, unpack_id(key) + 1)
                break
            there = cursor.prev()
    return above
