"""Blocks that are not what they should be, each put into a home behind its back: set apart, and never decoded."""

import struct
from collections.abc import Callable
from functools import partial

import pytest
import xxhash
import zstandard

from tests.end_to_end.commands import Place
from tests.hostile import raw
from tests.hostile.cases import Case, check
from tests.hostile.nursery import Nursery

pytestmark = pytest.mark.long

SHORT, LONG = 4, 12
"""The ids of blocks of 13 tokens, which lies in a page with others, and of 37, which has pages of its own."""
ALONE = f"^missing: {LONG}$"

Change = Callable[[bytes], bytes]


def stored(place: Place, id: int = LONG) -> bytes:
    """A block, without compression."""
    value = raw.get(place, "blocks", raw.key_of(id))
    return zstandard.decompress(value) if value[:4] == zstandard.FRAME_HEADER else value


def change(place: Place, work: Change, id: int = LONG) -> None:
    raw.put(place, "blocks", raw.key_of(id), work(stored(place, id)))


def changed(work: Change, expected: str = ALONE, **more: bool) -> Case:
    return Case(partial(change, work=work), expected, **more)


def resealed(block: bytes) -> bytes:
    """With the digest that fits."""
    end = min(64 + int.from_bytes(block[32:36], "little"), len(block))
    return block[:48] + xxhash.xxh3_128_digest(block[:48] + block[64:end]) + block[64:]


def field(offset: int, kind: str, value: int) -> Change:
    """Another value in the header, and a digest that fits."""

    def work(block: bytes) -> bytes:
        size = struct.calcsize(kind)
        return resealed(block[:offset] + struct.pack(kind, value) + block[offset + size :])

    return work


def swap(place: Place) -> None:
    short, long = stored(place, SHORT), stored(place)
    raw.put(place, "blocks", raw.key_of(SHORT), long)
    raw.put(place, "blocks", raw.key_of(LONG), short)


def from_another_bank(place: Place) -> None:
    raw.put(place, "blocks", raw.key_of(LONG), raw.get(place, "blocks", raw.key_of(LONG), bank="other/bank"))


def removed(place: Place) -> None:
    with raw.records(place, "blocks") as (txn, _):
        assert txn.delete(raw.key_of(LONG))


def unreferenced(place: Place) -> None:
    raw.put(place, "blocks", raw.key_of(1000), stored(place))


def odd_key(place: Place) -> None:
    raw.put(place, "blocks", b"odd", stored(place))


def frame(blocks: int, *, states: int | None, dictionary: int | None = None, window: int | None = None) -> bytes:
    """A zstd frame of so many pieces of 128 KiB of zeros, 4 bytes each, that says it holds what it says."""
    descriptor = (0 if states is None else 0xC0) | (0x20 if window is None and states is not None else 0)
    head = struct.pack("<IB", 0xFD2FB528, descriptor | (3 if dictionary is not None else 0))
    if not descriptor & 0x20:
        head += bytes([0x50 if window is None else window])
    head += b"" if dictionary is None else struct.pack("<I", dictionary)
    head += b"" if states is None else struct.pack("<Q", states)
    pieces = [struct.pack("<I", (1 << 17 << 3) | 2 | (i == blocks - 1))[:3] + b"\0" for i in range(blocks)]
    return head + b"".join(pieces)


GIB = 1 << 13
"""Pieces of 128 KiB in a gibibyte."""
COMPRESSED = zstandard.ZstdCompressor().compress


CASES: dict[str, Case] = {
    "nothing done": changed(lambda block: block, "^whole$"),
    "without its last byte": changed(lambda block: block[:-1]),
    "only a header": changed(lambda block: block[:64]),
    "less than a header": changed(lambda block: block[:63]),
    "four bytes": changed(lambda block: block[:4]),
    "no bytes": changed(lambda block: b""),
    "a byte longer": changed(lambda block: block + b"\0", f"^whole$|{ALONE}"),
    "4 MiB longer": changed(lambda block: block + bytes(4 << 20), f"^whole$|{ALONE}"),
    "zeros": changed(lambda block: bytes(len(block))),
    "swapped with another": Case(swap, f"^missing: {SHORT} {LONG}$"),
    "of another bank": Case(from_another_bank, ALONE),
    "gone": Case(removed, ALONE),
    "without a reference": Case(unreferenced, "^whole$"),
    "under a key that is no id": Case(odd_key, "^whole$|^refused"),
    "another magic": changed(field(0, "<I", 0)),
    "version 0": changed(field(4, "<H", 0)),
    "version 2": changed(field(4, "<H", 2)),
    "another id": changed(field(8, "<Q", SHORT)),
    "an id at the end": changed(field(8, "<Q", 2**64 - 1)),
    "another bank's fingerprint": changed(field(16, "<Q", 7)),
    "a payload of 4 GiB": changed(field(32, "<I", 2**32 - 1)),
    "a payload longer than the slot": changed(field(32, "<I", 1 << 16)),
    "a payload one byte longer": changed(field(32, "<I", 2665)),
    "a field that must be zero": changed(field(36, "<I", 1)),
    "another codec's fingerprint": changed(field(40, "<Q", 7)),
    # What a forger wrote is in the bank. It must be refused or be decoded as it is: nothing else.
    "no tokens": changed(field(6, "<H", 0), ALONE, forged=True),
    "65535 tokens": changed(field(6, "<H", 65535), ALONE, forged=True),
    "a token more than there can be": changed(field(6, "<H", 41), ALONE, forged=True),
    "a token less than its payload has": changed(field(6, "<H", 36), f"^less$|{ALONE}", forged=True),
    "no payload": changed(field(32, "<I", 0), f"^less$|{ALONE}", forged=True),
    "any codes": changed(lambda block: resealed(block[:64] + bytes(255 for _ in block[64:])), "^less$", forged=True),
    "compressed": changed(COMPRESSED, "^whole$"),
    "compressed, and cut off": changed(lambda block: COMPRESSED(block)[:-1]),
    "compressed, and garbage behind": changed(lambda block: COMPRESSED(block) + b"garbage", f"^whole$|{ALONE}"),
    "compressed, and another frame behind": changed(lambda block: COMPRESSED(block) * 2, f"^whole$|{ALONE}"),
    "compressed twice": changed(lambda block: COMPRESSED(COMPRESSED(block))),
    "a frame of nothing": changed(lambda block: COMPRESSED(b"")),
    "the beginning of a frame": changed(lambda block: zstandard.FRAME_HEADER),
    "a frame's head": changed(lambda block: frame(1, states=64)[:13]),
    "8 GiB that say so": changed(lambda block: frame(8 * GIB, states=8 << 30)),
    "8 GiB that say nothing": changed(lambda block: frame(8 * GIB, states=None)),
    "8 GiB that say they are a block": changed(lambda block: frame(8 * GIB, states=len(block))),
    "8 GiB that say they are a block, in a window": changed(lambda b: frame(8 * GIB, states=len(b), window=0x50)),
    "a window of 3 TiB": changed(lambda block: frame(1, states=len(block), window=0xFF)),
    "2^64 - 1 bytes": changed(lambda block: frame(1, states=2**64 - 1)),
    "a dictionary that nobody has": changed(lambda block: frame(1, states=len(block), dictionary=0xDEAD)),
    "a bomb in a frame": changed(lambda block: COMPRESSED(frame(8 * GIB, states=None))),
    "a frame that may be skipped": changed(lambda block: struct.pack("<II", 0x184D2A50, len(block)) + block),
    "a frame that may be skipped, of 4 GiB": changed(lambda block: struct.pack("<II", 0x184D2A50, 2**32 - 1)),
}
for offset in (*range(0, 64, 5), 64, 100, 2000, 2727):
    CASES[f"bit {offset % 8} of byte {offset} flipped"] = changed(
        lambda block, offset=offset: raw.flip(block, 8 * offset + offset % 8)  # type: ignore[misc]
    )


@pytest.mark.parametrize("name", CASES)
def test_block(nursery: Nursery, name: str) -> None:
    check(nursery, __name__, CASES, name)
