"""The databases of an LMDB home, and how they are made and opened.

==========  ==========================  =============================================================
database    key                         value
==========  ==========================  =============================================================
home        ``version``                 2, and nothing else: every release can read it
home        ``slot_bytes``              *sealed* decimal
home        ``next_id``                 *sealed* decimal
home        ``packing``                 *sealed* ``none``, ``zstd`` or ``dictionary``: see `Packing`
home        ``dictionary``              *sealed* dictionary of zstd
blocks      id                          exactly the block's bytes, not the slot, or a zstd frame of them
references  id                          *sealed* JSON of text, source, start, end, tokens
digests     digest of the text          *sealed* id
sources     digest of the source        *sealed* count and sum of its ids, 8 bytes each, and its name
members     digest of the source        ids, sorted
embeddings  id                          *sealed* float32, little-endian
quarantine  id                          *sealed* reason
cold        id                          *sealed* nothing: a reference that has no block yet
meta        any                         *sealed* any
==========  ==========================  =============================================================

Ids have 8 bytes, big-endian. A digest of a text is BLAKE2b of its UTF-8, 32 bytes. A sealed value follows 8 bytes of
XXH3-64 over the database's name, a zero byte, the key's length (16 bits), the key and the value.

A home of an earlier release has no `cold`: whoever opens it for writing adds it, for others nothing in it is cold.
"""

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, cast, get_args

import lmdb

from m3backends.lmdb.compression import Method, Packing, load_dictionary
from m3backends.lmdb.environment import Environment, Reading, Writing
from m3backends.lmdb.records import unpack_id, unpack_number, unpack_text
from m3backends.lmdb.table import Absent, Table
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

VERSION = 2
_LARGEST_SLOT = 64 + 2**32
_BY_ID = ("references", "embeddings", "quarantine", "cold")
_UNSEALED = ("blocks", "members")
_LATER = "cold"
"""Not in homes of earlier releases."""


class Databases(NamedTuple):
    """The databases; the fields are their names."""

    home: Table
    blocks: "lmdb._Database"
    references: Table
    digests: Table
    sources: Table
    members: "lmdb._Database"
    embeddings: Table
    quarantine: Table
    meta: Table
    cold: Table


class Opened(NamedTuple):
    """An open home."""

    databases: Databases
    slot_bytes: int
    above: int
    """An id above all whose records are there and sound."""
    packing: Packing | None
    """What was decided, if it was."""


def create_folder(path: Path, slot_bytes: int | None, read_only: bool) -> None:
    """Make the folder of a new home; LMDB makes the files. Raises `BankMissingError`, `BankError`."""
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
    """Open the databases, or make all in one transaction.

    Raises `BankMissingError`, `BankError`, `BankFormatError` or `BankMismatchError`: see `LmdbHome`.
    """
    path = environment.path
    there = environment.read(lambda txn: {bytes(name) for name in txn.cursor().iternext(values=False)})
    if there and b"home" not in there:
        raise BankError(f"{environment.files.data} belongs to another program")
    if not there and (environment.read_only or slot_bytes is None):
        raise BankMissingError(f"there is no bank at {path}")

    def make(txn: Writing) -> Databases:
        databases = _open_all(environment, txn, set())
        if txn.put(b"version", b"%d" % VERSION, overwrite=False, db=databases.home.handle):
            databases.home.put(txn, b"slot_bytes", b"%d" % (slot_bytes or 0))
            databases.home.put(txn, b"next_id", b"0")
        return databases

    def look(txn: Reading) -> Opened:
        _check_version(txn, databases, path)
        slot, next_id = (databases.home.read(txn, key, unpack_number) for key in (b"slot_bytes", b"next_id"))
        if slot is None or next_id is None or slot > _LARGEST_SLOT or next_id > 2**64:
            raise ValueError(f"it states slots of {slot} bytes and {next_id} as the next id")
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
    if isinstance(opened.databases.cold, Absent) and not environment.read_only:
        opened = opened._replace(databases=_add_cold(environment, opened.databases))
    if not there:  # LMDB syncs the file, not the folders that name it
        sync_folder(path)
        sync_folder(path.parent)
    return opened


def _add_cold(environment: Environment, databases: Databases) -> Databases:
    """With the database that homes of earlier releases lack; without it where there is no room, so that they open."""
    with suppress(BankFullError):
        handle = environment.write(lambda txn: environment.env.open_db(_LATER.encode(), txn), reserve=True)
        return databases._replace(cold=Table(environment.path, _LATER, handle, by_id=True))
    return databases


def store_packing(txn: Writing, databases: Databases, packing: Packing) -> None:
    """Record how blocks are packed from now on."""
    databases.home.put(txn, b"packing", packing.method.encode())
    if packing.dictionary:
        databases.home.put(txn, b"dictionary", packing.dictionary)


def _packing(txn: Reading, databases: Databases) -> Packing | None:
    method = databases.home.read(txn, b"packing", unpack_text)
    dictionary = databases.home.read(txn, b"dictionary", bytes) or b""
    if method not in (None, *get_args(Method)) or (method == "dictionary") != bool(dictionary):
        raise ValueError(f"it states {method!r} as its packing, with {len(dictionary)} bytes of a dictionary")
    load_dictionary(dictionary)
    return None if method is None else Packing(cast(Method, method), dictionary)


def _open_all(environment: Environment, txn: Writing | None, there: set[bytes]) -> Databases:
    """Open each database, or, with ``txn``, make it. Raises `lmdb.Error`, and `ValueError` for one of other properties.

    ``there`` are the names of those that there are.
    """
    env, opened = environment.env, dict[str, Table | lmdb._Database]()
    # LMDB drops handles that were opened in a transaction which did not commit, as one that only reads.
    for name in Databases._fields:
        if name == _LATER and txn is None and name.encode() not in there:
            opened[name] = Absent(environment.path, name)
            continue
        handle = env.open_db(name.encode(), txn, dupsort=name == "members", create=txn is not None)
        if {flag for flag, on in handle.flags().items() if on} != ({"dupsort"} if name == "members" else set()):
            raise ValueError(f"{name} has other properties")
        sealed = name not in _UNSEALED
        opened[name] = Table(environment.path, name, handle, by_id=name in _BY_ID) if sealed else handle
    return Databases(**opened)  # type: ignore[arg-type]


def _check_version(txn: Reading, databases: Databases, path: Path) -> None:
    version = unpack_number(txn.get(b"version", b"", db=databases.home.handle))
    if version != VERSION:
        mend = "install a newer m3runtime" if version > VERSION else "write the bank anew"
        raise BankFormatError(f"bank {path} has format {version}, this release reads {VERSION}; {mend}")


def _check_findable(txn: Reading, databases: Databases) -> None:
    """Raise `ValueError` where LMDB walks by a record that it does not find: damaged branches of a tree do that."""
    for name, one in databases._asdict().items():
        if isinstance(one, Absent):
            continue
        handle = one.handle if isinstance(one, Table) else one
        walk, probe = txn.cursor(handle), txn.cursor(handle)
        while walk.next():  # at first to the first
            key = walk.key()
            if not (probe.set_key_dup(key, walk.value()) if name == "members" else probe.set_key(key)):
                raise ValueError(f"{name} has a record that its key, {key.hex()[:20]}, does not lead to")


def above_all(txn: Reading, databases: Databases) -> int:
    """The id above all that are in use, whatever ``next_id`` says: above the last key of a sound record."""
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
