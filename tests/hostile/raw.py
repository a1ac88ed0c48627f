"""The back door of an LMDB home: its records as they are stored, read and written without the home."""

from collections.abc import Iterator
from contextlib import contextmanager

import lmdb
import xxhash

from tests.end_to_end.commands import Place

NAMES = ("home", "blocks", "references", "digests", "sources", "members", "embeddings", "quarantine", "meta")


@contextmanager
def records(
    place: Place, database: str, bank: str = "bank"
) -> "Iterator[tuple[lmdb.Transaction[bytes], lmdb._Database]]":
    """A write transaction on one database of the closed home."""
    env = lmdb.Environment(str(place.folder / bank / "home"), map_size=1 << 30, max_dbs=16)
    try:
        db = env.open_db(database.encode(), dupsort=database == "members", create=False)
        with env.begin(db=db, write=True) as txn:
            yield txn, db
    finally:
        env.close()


def get(place: Place, database: str, key: bytes, bank: str = "bank") -> bytes:
    with records(place, database, bank) as (txn, _):
        value = txn.get(key)
    assert value is not None, (database, key)
    return bytes(value)


def put(place: Place, database: str, key: bytes, value: bytes) -> None:
    with records(place, database) as (txn, _):
        txn.put(key, value)


def key_of(id: int) -> bytes:
    return id.to_bytes(8, "big")


def sealed(database: str, key: bytes, value: bytes) -> bytes:
    """The value behind a seal that fits it, as whoever knows the format can write it."""
    return xxhash.xxh3_64_digest(database.encode() + b"\0" + len(key).to_bytes(2, "big") + key + value) + value


def flip(data: bytes, bit: int) -> bytes:
    """The same bytes but for one bit."""
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)
