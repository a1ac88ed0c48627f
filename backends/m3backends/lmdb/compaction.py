"""Compaction: the records of a home are copied into a new file, which then takes the place of the old one.

LMDB marks the pages of deleted records as free, and their bytes stay in the file. Bytes of deleted records also stay
in pages that are in use, between the records and behind them. LMDB's own ``mdb_env_copy`` copies whole pages and such
bytes with them, so here each record is copied by itself: no byte of the new file was ever part of anything else.

Other processes may read meanwhile. They have the old file open, share LMDB's lock file with those that open the new
one, and find in it the number of the last transaction. So the new file gets that number.
"""

from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb

from m3backends.lmdb.compression import ENOUGH, ZSTD, Packing, decide, load_dictionary, unpack
from m3backends.lmdb.records import seal
from m3backends.lmdb.structure import set_last_transaction
from m3backends.lmdb.table import RecordTable, go_behind

if TYPE_CHECKING:
    from m3backends.lmdb.schema import Databases

_PIECE = 16 << 20
"""Bytes of records that are copied in one transaction."""
_MARGIN = 64 << 20

Rewrite = Callable[[str, bytes, memoryview], bytes | memoryview | None]
"""A function from a database, a key and the stored value to the value for the new file; None leaves the record out."""


def copy_records(old: lmdb.Environment, new: Path, databases: "Databases", rewrite: Rewrite) -> None:
    """Copy all records of an environment that nobody writes into the empty file ``new``, and sync it.

    The old environment may get empty transactions. Raises `lmdb.Error`.
    """
    handles = {name: of.handle if isinstance(of, RecordTable) else of for name, of in _existing(databases)}
    size = (old.info()["last_pgno"] + 1) * old.stat()["psize"] + _MARGIN
    target = lmdb.Environment(
        str(new), subdir=False, lock=False, sync=False, map_size=size, max_dbs=len(handles), lib_version=0
    )
    with closing(target):
        for name, handle in handles.items():
            copy = target.open_db(name.encode(), dupsort=handle.flags()["dupsort"])
            _copy(old, handle, target, copy, lambda key, value, name=name: rewrite(name, key, value))  # type: ignore[misc]
        if (target.info()["last_txnid"] - old.info()["last_txnid"]) % 2:
            commit_nothing(target)
        target.sync(True)
        count = target.info()["last_txnid"]
    while old.info()["last_txnid"] < count:  # rarely: it was written in fewer transactions than it was copied in
        commit_nothing(old)
        commit_nothing(old)
    set_last_transaction(new, old.info()["last_txnid"])


def verbatim(_: str, __: bytes, value: memoryview) -> memoryview:
    """Copies a record as it is."""
    return value


def repacked(old: lmdb.Environment, databases: "Databases", slot_bytes: int, packing: Packing) -> Rewrite:
    """A function that packs blocks anew if their dictionary was made of blocks: it has parts of them.

    The remaining blocks decide on the packing; if they are too few, it is left to the next that are written.
    """
    if packing.method != "dictionary":
        return verbatim
    dictionary = load_dictionary(packing.dictionary)
    with old.begin(buffers=True) as txn:
        stored = islice(txn.cursor(databases.blocks).iternext(keys=False), ENOUGH)
        samples = [block.copy() for one in stored if len(block := unpack(one, slot_bytes, dictionary))]
    decided = decide(samples) if len(samples) == ENOUGH else None
    pack = (decided or ZSTD).packer()
    home: dict[bytes, bytes] = {}
    if decided is not None:
        home = {b"packing": decided.method.encode(), b"dictionary": decided.dictionary}

    def rewrite(database: str, key: bytes, value: memoryview) -> bytes | memoryview | None:
        if database == "blocks" and len(block := unpack(value, slot_bytes, dictionary)):  # a damaged one stays damaged
            return pack(block)
        if database == "home" and key in (b"packing", b"dictionary"):
            content = home.get(key)
            return seal(database, key, content) + content if content else None
        return value

    return rewrite


def commit_nothing(env: lmdb.Environment) -> None:
    """Commit a transaction that changes nothing. Raises `lmdb.MapFullError` if no page is free."""
    with env.begin(write=True) as txn:
        txn.put(b"\0turn", b"")
        txn.delete(b"\0turn")


def _existing(databases: "Databases") -> Iterator[tuple[str, "RecordTable | lmdb._Database"]]:
    for name, one in databases._asdict().items():
        if not isinstance(one, RecordTable) or one.exists:
            yield name, one


def _copy(
    old: lmdb.Environment,
    handle: "lmdb._Database",
    new: lmdb.Environment,
    copy: "lmdb._Database",
    rewrite: Callable[[bytes, memoryview], bytes | memoryview | None],
) -> None:
    """Copy one database, a piece in each transaction."""
    duplicates = handle.flags()["dupsort"]
    last: tuple[bytes, bytes] | None = None
    more = True
    while more:
        size = 0
        with old.begin(buffers=True) as source, new.begin(write=True) as txn:
            cursor = source.cursor(handle)
            more = go_behind(cursor, last, duplicates=duplicates)
            while more and size < _PIECE:
                key, stored = bytes(cursor.key()), cursor.value()
                value = rewrite(key, stored)
                if value is not None:
                    txn.put(key, value, append=True, db=copy)
                    size += len(value)
                last = key, bytes(stored) if duplicates else b""
                more = cursor.next()
        old.set_mapsize(old.info()["map_size"])  # or what was read would stay in the memory of the process
