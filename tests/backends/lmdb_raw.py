"""A closed LMDB home by its back door: LMDB's own transactions, and records as whoever knows the format writes them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import lmdb
import numpy as np
import xxhash

from m3runtime.storage.home import Batch
from m3runtime.testing.blocks import make_batch, make_embeddings

NAMES = ("home", "blocks", "references", "digests", "sources", "members", "embeddings", "quarantine", "meta")


@contextmanager
def database(path: Path, name: str) -> "Iterator[tuple[lmdb.Transaction[bytes], lmdb._Database]]":
    """A write transaction on one database."""
    with lmdb.open(str(path), max_dbs=16, map_size=1 << 30) as env:
        db = env.open_db(name.encode(), dupsort=name == "members", create=False)
        with env.begin(write=True, db=db) as txn:
            yield txn, db


def change(path: Path, name: str, key: bytes, changed: Callable[[bytes], bytes | None]) -> None:
    """Put what ``changed`` makes of a record in its place, None: nothing."""
    with database(path, name) as (txn, _):
        value = changed(txn.get(key) or b"")
        if value is None:
            txn.delete(key)
        else:
            txn.put(key, value)


def records(path: Path, name: str) -> list[tuple[bytes, bytes]]:
    """All keys and values of a database."""
    with database(path, name) as (txn, db):
        return [(bytes(key), bytes(value)) for key, value in txn.cursor(db)]


def sealed(name: str, key: bytes, value: bytes) -> bytes:
    """A value behind the seal that fits it."""
    return xxhash.xxh3_64_digest(name.encode() + b"\0" + len(key).to_bytes(2, "big") + key + value) + value


def flipped(value: bytes, bit: int) -> bytes:
    """The same bytes but for one bit."""
    changed = bytearray(value)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def key_of(id: int) -> bytes:
    return id.to_bytes(8, "big")


def unit_batch(ids: list[int] | range) -> Batch:
    """As `make_batch`, with embeddings as an embedder gives them."""
    batch = make_batch(ids)
    vectors = make_embeddings(batch.ids)
    return replace(batch, embeddings=(vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32))
