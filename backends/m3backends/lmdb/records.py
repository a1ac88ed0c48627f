"""The bytes of ids, texts, references and sources in an LMDB home, and the seals of its records.

Integers are big-endian, so that LMDB's order of keys is the order of ids. Texts may hold lone surrogates, as file
names do, hence ``surrogatepass``. Functions that read raise `ValueError` for bytes of another form.
"""

import json
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import xxhash

from m3runtime.documents.reference import Place, Reference
from m3runtime.documents.sources import SourceState
from m3runtime.memory.block import Ids

SEAL_BYTES = 8
_DECODER = json.JSONDecoder()


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


def pack_text(text: str) -> bytes:
    """UTF-8, lone surrogates included."""
    return text.encode("utf-8", "surrogatepass")


def unpack_text(value: bytes | memoryview) -> str:
    """The text that `pack_text` wrote."""
    return bytes(value).decode("utf-8", "surrogatepass")


def digest(text: str, heading: str = "") -> bytes:
    """BLAKE2b of a text, or of a text under its heading, 32 bytes.

    Cryptographic: nobody can write two that share one.
    """
    if not heading:
        return blake2b(pack_text(text), digest_size=32).digest()
    packed = pack_text(heading)
    under = len(packed).to_bytes(4, "big") + packed
    return blake2b(under + pack_text(text), digest_size=32, person=b"heading").digest()


def identity(reference: Reference) -> bytes:
    """The digest of a reference's text and heading."""
    return digest(reference.text, reference.heading)


def pack_reference(reference: Reference) -> bytes:
    """A JSON array of text, tokens, heading and places; each place is an array of its fields."""
    return _pack_json([reference.text, reference.tokens, reference.heading, [astuple(one) for one in reference.places]])


def unpack_reference(value: bytes | memoryview) -> Reference:
    """The reference that `pack_reference` wrote, or an earlier release: text, source, start, end and tokens."""
    match _unpack_json(value):
        case [str(text), str(source), int(start), int(end), int(tokens)] if _are_numbers(start, end, tokens):
            return Reference(text, tokens, places=(Place(source, start, end),))
        case [str(text), int(tokens), str(heading), list(places)] if places and _are_numbers(tokens):
            return Reference(text, tokens, heading, tuple(map(_place, places)))
    raise ValueError("not text, tokens, heading and places")


def _place(fields: object) -> Place:
    match fields:
        case [str(source), int(start), int(end), dict(metadata)] if _are_numbers(start, end) and all(
            isinstance(text, str) for text in metadata.values()
        ):
            return Place(source, start, end, metadata)
    raise ValueError("not source, start, end and metadata of a place")


def _are_numbers(*values: int) -> bool:
    """Are none of these integers booleans?"""
    return not any(isinstance(value, bool) for value in values)


_STATE = (str, int, int, str, str, str, list, list)
"""The types of a stored state: its source's name and its fields."""


def pack_state(name: str, state: SourceState) -> bytes:
    """A JSON array of the source's name and the fields of its state."""
    return _pack_json([name, *astuple(state)])


def unpack_state(value: bytes | memoryview) -> tuple[str, SourceState]:
    """The name and the state that `pack_state` wrote."""
    fields = _unpack_json(value)
    if isinstance(fields, list) and len(fields) in (5, 7):  # of an earlier release
        fields += ["", [], []][len(fields) - 5 :]
    if not (isinstance(fields, list) and tuple(map(type, fields)) == _STATE):  # a pattern takes twice as long
        raise ValueError("not the fields of a state")
    name, size, time, digest, how, expires, unread, tags = fields
    if unread and not all(isinstance(reason, str) for reason in unread):
        raise ValueError("not the fields of a state")
    if not all(isinstance(tag, list) and list(map(type, tag)) == [str, str] for tag in tags):
        raise ValueError("not the fields of a state")
    return name, SourceState(size, time, digest, how, expires, tuple(unread), tuple(map(tuple, tags)))


def _pack_json(value: object) -> bytes:
    return pack_text(json.dumps(value, separators=(",", ":"), ensure_ascii=False))


def _unpack_json(value: bytes | memoryview) -> Any:
    text = unpack_text(value)
    try:
        found, end = _DECODER.raw_decode(text)  # `json.loads` looks for white space, which takes twice as long as this
    except RecursionError as error:
        raise ValueError(str(error)) from error
    if end != len(text):
        raise ValueError(f"there is more behind character {end}")
    return found


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
