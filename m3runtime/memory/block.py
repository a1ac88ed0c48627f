"""The block: one encoded memory as bytes, 64 bytes of header and a payload.

======  ======  ==============================================================
offset  bytes   field (little-endian)
======  ======  ==============================================================
0       4       magic, ``M3BK``
4       2       format version
6       2       tokens that exist
8       8       id
16      16      fingerprint of the bank
32      4       length of the payload
36      4       zero
40      8       first half of the codec's fingerprint
48      16      XXH3-128 of bytes 0-47 and the payload
======  ======  ==============================================================

A block lies at the start of a *slot*; slots of a bank are all as long as the block of a full reference. What follows a
shorter block in its slot is never read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from m3runtime.errors import BlockError, InputError

MAGIC = b"M3BK"
VERSION = 1
HEADER = np.dtype(
    [
        ("magic", "S4"),
        ("version", "<u2"),
        ("tokens", "<u2"),
        ("id", "<u8"),
        ("bank", "V16"),
        ("payload", "<u4"),
        ("zero", "<u4"),
        ("codec", "V8"),
        ("digest", "V16"),
    ]
)
HEADER_BYTES = HEADER.itemsize
_DIGEST_AT = 48

Rows = npt.NDArray[np.uint8]
Ids = npt.NDArray[np.uint64]
Found = npt.NDArray[np.bool_]


class Stamps(Protocol):
    """The stamps that the blocks of a bank may have: one for each of its codecs. Thread-safe."""

    def bank_of(self, codec: bytes) -> bytes | None:
        """The 16 bytes of the bank in blocks with these 8 bytes of a codec; None if the bank has no such codec."""


@dataclass(frozen=True, slots=True)
class BlockStamp:
    """The fingerprints of bank and codec, as hex, that all blocks of one codec share. Alone, it is `Stamps`."""

    bank: str
    codec: str

    @property
    def bank_bytes(self) -> bytes:
        """The 16 bytes that a header holds."""
        return bytes.fromhex(self.bank)

    @property
    def codec_bytes(self) -> bytes:
        """The 8 bytes that a header holds."""
        return bytes.fromhex(self.codec)[:8]

    def bank_of(self, codec: bytes) -> bytes | None:
        """See `Stamps.bank_of`."""
        return self.bank_bytes if codec == self.codec_bytes else None


class BlockStamps:
    """The stamps of several codecs, as `Stamps`."""

    def __init__(self, stamps: Sequence[BlockStamp]) -> None:
        self._bank_of = {stamp.codec_bytes: stamp.bank_bytes for stamp in stamps}

    def bank_of(self, codec: bytes) -> bytes | None:
        """See `Stamps.bank_of`."""
        return self._bank_of.get(codec)


def as_ids(ids: Sequence[int] | Ids) -> Ids:
    """Ids as ``uint64[n]``. Raises `InputError` for a number that no id can be."""
    try:
        return np.array(list(ids), np.uint64)
    except OverflowError:
        raise InputError(f"there is no memory {max(ids, key=abs)}: ids lie between 0 and 2**64") from None


def distinct(ids: Ids) -> Ids:
    """The ids ascending, each once. `np.unique` takes 20 times as long for a million, since numpy 2.3 hashes them."""
    ordered = np.sort(ids)
    return ordered[np.concatenate([[True], ordered[1:] != ordered[:-1]])] if len(ordered) else ordered


def without(ids: Ids, others: Ids) -> Ids:
    """The ids that are not among others. Each stands once in its array, which saves numpy seconds for a million."""
    left: Ids = np.setdiff1d(ids, others, assume_unique=True)
    return left


def headers(blocks: Rows) -> npt.NDArray[np.void]:
    """The headers of ``uint8[n, slot]`` blocks as a structured array, field by field, without a copy when possible."""
    return np.ascontiguousarray(blocks[:, :HEADER_BYTES]).view(HEADER)[:, 0]


def length(block: Rows) -> int:
    """Bytes of one block, header and payload, as its own header states it. Trusts the header: `check` first."""
    return HEADER_BYTES + int.from_bytes(block[32:36].tobytes(), "little")


def digest(block: Rows, end: int) -> bytes:
    """XXH3-128 over a block that ends at ``end``, its digest field left out."""
    state = xxhash.xxh3_128()
    state.update(block[:_DIGEST_AT].data)
    state.update(block[HEADER_BYTES:end].data)
    return state.digest()


def seal(block: Rows, *, id: int, tokens: int, payload_bytes: int, stamp: BlockStamp) -> None:
    """Write the header of a block whose payload lies at ``block[64 : 64 + payload_bytes]``, in place."""
    header = np.zeros((), HEADER)
    header["magic"], header["version"], header["tokens"], header["id"] = MAGIC, VERSION, tokens, id
    header["bank"], header["payload"], header["codec"] = stamp.bank_bytes, payload_bytes, stamp.codec_bytes
    block[:HEADER_BYTES] = np.frombuffer(header.tobytes(), np.uint8)
    block[_DIGEST_AT:HEADER_BYTES] = np.frombuffer(digest(block, HEADER_BYTES + payload_bytes), np.uint8)


def check(block: Rows, *, id: int, stamp: Stamps) -> int:
    """Return the length of a block after every field and the digest were found right.

    Raises `BlockError` that names the id and the first thing wrong. ``block`` may be a whole slot.
    """
    if len(block) < HEADER_BYTES:
        raise BlockError(f"block {id}: {len(block)} bytes are no header")
    header = np.frombuffer(block[:HEADER_BYTES].tobytes(), HEADER)[0]
    end = HEADER_BYTES + int(header["payload"])
    if header["magic"] != MAGIC:
        raise BlockError(f"block {id}: not a block (magic {bytes(header['magic'])!r})")
    if header["version"] != VERSION:
        raise BlockError(f"block {id}: format version {header['version']}, this release reads {VERSION}")
    if int(header["id"]) != id:
        raise BlockError(f"block {id}: holds block {header['id']}")
    bank = stamp.bank_of(bytes(header["codec"]))
    if bank is None:
        raise BlockError(f"block {id}: was encoded by another codec")
    if bytes(header["bank"]) != bank:
        raise BlockError(f"block {id}: belongs to another bank")
    if end > len(block):
        raise BlockError(f"block {id}: {end} bytes do not fit {len(block)}")
    if header["zero"] != 0 or bytes(header["digest"]) != digest(block, end):
        raise BlockError(f"block {id}: digest does not match")
    return end
