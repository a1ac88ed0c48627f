"""How the LMDB home writes ids, texts and references as bytes.

Integers are big-endian, so that LMDB's order of keys is the order of ids. Texts may hold lone surrogates,
as file names do, hence ``surrogatepass``.
"""

import json
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np

from m3runtime.block import Ids
from m3runtime.errors import TierError
from m3runtime.tier import Reference


def pack_id(id: int) -> bytes:
    """Eight bytes that sort as the id does."""
    return id.to_bytes(8, "big")


def pack_ids(ids: Ids) -> list[bytes]:
    """`pack_id` of each."""
    packed = ids.astype(">u8").tobytes()
    return [packed[at : at + 8] for at in range(0, len(packed), 8)]


def unpack_ids(keys: Iterable[bytes | memoryview]) -> Ids:
    """``uint64[n]`` of what `pack_id` made."""
    return np.frombuffer(b"".join(keys), ">u8").astype(np.uint64)


def pack_text(text: str) -> bytes:
    """The text's bytes."""
    return text.encode("utf-8", "surrogatepass")


def unpack_text(value: bytes | memoryview) -> str:
    """Read what `pack_text` wrote."""
    return bytes(value).decode("utf-8", "surrogatepass")


def digest(text: str) -> bytes:
    """32 bytes that stand for the text. Cryptographic: nobody can write two texts that share one."""
    return blake2b(pack_text(text), digest_size=32).digest()


def pack_reference(reference: Reference) -> bytes:
    """A JSON array of the fields, in order."""
    fields = [reference.text, reference.source, reference.start, reference.end, reference.tokens]
    return pack_text(json.dumps(fields, separators=(",", ":"), ensure_ascii=False))


def unpack_reference(value: bytes | memoryview) -> Reference:
    """Read what `pack_reference` wrote. Raises `TierError` if that is not what the bytes are."""
    try:
        text, source, start, end, tokens = json.loads(unpack_text(value))
    except ValueError as error:
        raise TierError(f"a stored reference is damaged: {error}") from error
    return Reference(text, source, start, end, tokens)
