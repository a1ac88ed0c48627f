"""Compression of stored blocks, each by itself, so that any block can be read alone.

The first blocks of a home decide how its blocks are packed, once: see `decide`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import zstandard

from m3runtime.memory.block import Rows

Compression = Literal["none", "zstd"]
Method = Literal["none", "zstd", "dictionary"]

ENOUGH = 64
"""The number of blocks that decide."""
_LEVEL = 3
_FRAME = zstandard.FRAME_HEADER
"""The first bytes of a compressed block; others begin with a block's own magic."""
_WORTH = 0.99
"""A method replaces a simpler one if it leaves at most this share of its size."""
_SAMPLE_BYTES = 32 << 20
_DICTIONARY_BYTES = 112 << 10


@dataclass(frozen=True, slots=True)
class Packing:
    """The way blocks are stored: as they are, as zstd frames, or as frames that need the home's dictionary."""

    method: Method
    dictionary: bytes = b""
    """Empty for the other methods."""

    def packer(self) -> Callable[[Rows], bytes | memoryview]:
        """A function from a block to its stored bytes, never more than the block has. For one thread."""
        if self.method == "none":
            return lambda block: block.data
        compressor = zstandard.ZstdCompressor(level=_LEVEL, dict_data=load_dictionary(self.dictionary))

        def pack(block: Rows) -> bytes | memoryview:
            frame = compressor.compress(block.data)
            return frame if len(frame) < len(block) else block.data

        return pack


PLAIN = Packing("none")
ZSTD = Packing("zstd")


def decide(blocks: Sequence[Rows]) -> Packing:
    """Choose a packing for blocks like these; there are at least two.

    zstd is chosen if it saves at least 1 %, and a dictionary trained on every second block if it saves at least 1 %
    more on the others.
    """
    blocks = _some(blocks)
    held_out = blocks[1::2]
    best, size = PLAIN, _size(PLAIN, held_out)
    for candidate in (ZSTD, _trained(blocks[::2])):
        if candidate is not None and (smaller := _size(candidate, held_out)) <= _WORTH * size:
            best, size = candidate, smaller
    return best


def load_dictionary(dictionary: bytes | memoryview) -> zstandard.ZstdCompressionDict | None:
    """Load a dictionary, which any number of threads may use. Raises `ValueError` if the bytes are none."""
    if not dictionary:
        return None
    loaded = zstandard.ZstdCompressionDict(bytes(dictionary))
    try:
        loaded.precompute_compress(level=_LEVEL)
    except zstandard.ZstdError as error:
        raise ValueError(f"it is no dictionary of zstd: {error}") from error
    if not loaded.dict_id():  # then no frame could name it
        raise ValueError("it is a dictionary without a number")
    return loaded


def dictionary_of(stored: memoryview) -> int:
    """The number of the dictionary that a stored block needs; 0 if it needs none or is damaged."""
    if stored[: len(_FRAME)] != _FRAME:
        return 0
    try:
        return zstandard.get_frame_parameters(stored).dict_id
    except zstandard.ZstdError:
        return 0


def unpack(stored: memoryview, slot_bytes: int, dictionary: zstandard.ZstdCompressionDict | None = None) -> Rows:
    """The block that was stored, compressed or not; empty, which fails every check, for a damaged frame.

    A frame counts as damaged, and is not decompressed, if it does not state a length of at most a slot or needs
    another dictionary.
    """
    if stored[: len(_FRAME)] != _FRAME:
        return np.asarray(stored)
    content = b""
    try:
        if 0 < zstandard.frame_content_size(stored) <= slot_bytes:
            content = zstandard.ZstdDecompressor(dict_data=dictionary).decompress(stored)
    except zstandard.ZstdError:
        pass
    return np.frombuffer(content, np.uint8)


def _some(blocks: Sequence[Rows]) -> Sequence[Rows]:
    """An evenly spread sample of at most `_SAMPLE_BYTES`, and at least eight blocks if there are as many."""
    step = sum(len(block) for block in blocks) // _SAMPLE_BYTES + 1
    return blocks[:: max(1, min(step, len(blocks) // 8))]


def _size(packing: Packing, blocks: Sequence[Rows]) -> int:
    pack = packing.packer()
    return sum(len(pack(block)) for block in blocks)


def _trained(blocks: Sequence[Rows]) -> Packing | None:
    size = min(_DICTIONARY_BYTES, sum(len(block) for block in blocks) // 8)
    try:
        dictionary = zstandard.train_dictionary(size, [block.tobytes() for block in blocks], level=_LEVEL)
    except zstandard.ZstdError:  # too few, or nothing in common
        return None
    return Packing("dictionary", dictionary.as_bytes())
