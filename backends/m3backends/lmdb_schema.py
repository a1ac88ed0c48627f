"""The databases of an LMDB home, and how they are made and opened.

==========  ===========================================  =====================================================
database    key                                          value
==========  ===========================================  =====================================================
home        ``version``, ``slot_bytes``, ``next_id``     decimal
blocks      id                                           exactly the block's bytes, not the slot
references  id                                           JSON of text, source, start, end, tokens
digests     digest of the text                           id
sources     digest of the source                         the source
members     digest of the source                         ids, sorted
embeddings  id                                           float32, little-endian
quarantine  id                                           reason
meta        any                                          any
==========  ===========================================  =====================================================
"""

import os
from pathlib import Path
from typing import NamedTuple

import lmdb

from m3backends.lmdb_environment import Environment, Reading, Writing
from m3runtime.errors import BankError, BankFormatError, BankMismatchError, BankMissingError

VERSION = 1


class Databases(NamedTuple):
    """Handles of the databases; the fields are their names."""

    home: "lmdb._Database"
    blocks: "lmdb._Database"
    references: "lmdb._Database"
    digests: "lmdb._Database"
    sources: "lmdb._Database"
    members: "lmdb._Database"
    embeddings: "lmdb._Database"
    quarantine: "lmdb._Database"
    meta: "lmdb._Database"


def create_folder(path: Path, slot_bytes: int | None, read_only: bool) -> None:
    """Make the folder of a new home; LMDB makes the files. Raises `BankMissingError`, `BankError`."""
    if path.exists() and not path.is_dir():
        raise BankError(f"{path} is not the folder of a bank")
    if (path / "data.mdb").exists():
        return
    if read_only or slot_bytes is None:
        raise BankMissingError(f"there is no bank at {path}")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BankError(f"bank {path}: {error}") from error


def open_databases(environment: Environment, slot_bytes: int | None) -> tuple[Databases, int]:
    """Open the databases, or make all in one transaction. Returns them and the bytes of a slot.

    Raises `BankMissingError`, `BankError`, `BankFormatError` or `BankMismatchError`: see `LmdbHome`.
    """
    path, env = environment.path, environment.env

    def names(txn: Reading | Writing) -> set[bytes]:
        return {bytes(name) for name in txn.cursor().iternext(values=False)}

    def open_all(txn: Writing | None) -> Databases:
        # LMDB drops handles that were opened in a transaction which did not commit, as one that only reads.
        return Databases(
            *(
                env.open_db(name.encode(), txn, dupsort=name == "members", create=txn is not None)
                for name in Databases._fields
            )
        )

    def make(txn: Writing) -> Databases:
        databases = open_all(txn)
        if txn.put(b"version", str(VERSION).encode(), overwrite=False, db=databases.home):
            txn.put(b"slot_bytes", str(slot_bytes).encode(), db=databases.home)
        return databases

    there = environment.read(names)
    if there and b"home" not in there:
        raise BankError(f"{environment.data} belongs to another program")
    if not there and (environment.read_only or slot_bytes is None):
        raise BankMissingError(f"there is no bank at {path}")
    try:
        databases = open_all(None) if there else environment.write(make)
        version, slot = environment.read(
            lambda txn: [int(bytes(txn.get(key, db=databases.home) or b"")) for key in (b"version", b"slot_bytes")]
        )
    except (lmdb.Error, ValueError) as error:
        raise BankError(f"bank {environment.data} is damaged: {error}") from error
    if version != VERSION:
        mend = "install a newer m3runtime" if version > VERSION else "write the bank anew"
        raise BankFormatError(f"bank {path} has format {version}, this release reads {VERSION}; {mend}")
    if slot_bytes not in (None, slot):
        raise BankMismatchError(f"bank {path} has slots of {slot} bytes, not {slot_bytes}")
    if not there and os.name == "posix":  # LMDB syncs the file, not the folders that name it
        for folder in (path, path.parent):
            file = os.open(folder, os.O_RDONLY)
            os.fsync(file)
            os.close(file)
    return databases, slot
