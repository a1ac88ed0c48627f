"""The bytes of ids and sources in an LMDB home, and the seals of its records.

Integers are big-endian, so that LMDB's order of keys is the order of ids. Functions that read raise `ValueError` for
bytes of another form.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import xxhash

from m3backends.records import pack_text, unpack_text
from m3runtime.memory.block import Ids

SEAL_BYTES = 8


def seal(database: str, key: bytes | memoryview, value: bytes | memoryview) -> bytes:
    """XXH3-64 over the database's name, a zero byte, the key's length (16 bits), the key and the value."""
    return xxhash.xxh3_64_digest(b"".join((database.encode(), b"\0", len(key).to_bytes(2, "big"), key, value)))


def pack_id(id: int) -> bytes:
    """Eight bytes in the order of ids."""
    return id.to_bytes(8, "big")


def pack_ids(ids: Ids) -> list[bytes]:
    """The bytes of each id."""
    packed = ids.astype(">u8").tobytes()
    return [packed[at : at + 8] for at in range(0, len(packed), 8)]


def unpack_id(key: bytes | memoryview) -> int:
    """The id that `pack_id` wrote."""
    if len(key) != 8:
        raise ValueError(f"{len(key)} bytes are no id")
    return int.from_bytes(key, "big")


def unpack_ids(keys: Iterable[bytes | memoryview]) -> Ids:
    """The ids that `pack_id` wrote, ``uint64[n]``."""
    packed = bytearray()  # not a list of keys, which takes hundreds of bytes for each
    for key in keys:
        if len(key) != 8:
            raise ValueError("there are keys that are no ids")
        packed += key
    return np.frombuffer(packed, ">u8").astype(np.uint64)


def pack_expiry(day: str, id: bytes) -> bytes:
    """A last day and an id, so that earlier days come first."""
    return pack_text(day) + id


def unpack_expiry(key: bytes) -> tuple[str, int]:
    """The last day and the id that `pack_expiry` wrote."""
    return unpack_text(key[:-8]), unpack_id(key[-8:])


@dataclass(frozen=True, slots=True)
class Source:
    """A source, with the count and sum of its members' ids, which have no seal of their own."""

    name: str
    count: int
    total: int
    """The sum of the ids of its references, modulo 2^64."""

    def with_more(self, ids: Iterable[int]) -> "Source":
        """This source with more ids."""
        more = list(ids)
        return replace(self, count=self.count + len(more), total=(self.total + sum(more)) % 2**64)

    def without(self, id: int) -> "Source":
        """This source without an id."""
        return replace(self, count=max(self.count - 1, 0), total=(self.total - id) % 2**64)

    def fits(self, ids: Ids) -> bool:
        """Are these its ids?"""
        return len(ids) == self.count and int(ids.sum(dtype=np.uint64)) == self.total


def pack_source(source: Source) -> bytes:
    """Count and total, 8 bytes each, and the name."""
    return source.count.to_bytes(8, "big") + source.total.to_bytes(8, "big") + pack_text(source.name)


def unpack_source(value: bytes | memoryview) -> Source:
    """The source that `pack_source` wrote."""
    if len(value) < 16:
        raise ValueError(f"{len(value)} bytes are no source")
    return Source(unpack_text(value[16:]), int.from_bytes(value[:8], "big"), int.from_bytes(value[8:16], "big"))


def unpack_count(value: bytes | memoryview) -> tuple[str, int]:
    """The name and the count of a source: there may be very many."""
    if len(value) < 16:
        raise ValueError(f"{len(value)} bytes are no source")
    return unpack_text(value[16:]), int.from_bytes(value[:8], "big")


def unpack_number(value: bytes | memoryview) -> int:
    """A decimal number of at most 20 digits."""
    if not 0 < len(value) <= 20 or not bytes(value).isdigit():
        raise ValueError(f"{bytes(value[:20])!r} is no number")
    return int(bytes(value))
