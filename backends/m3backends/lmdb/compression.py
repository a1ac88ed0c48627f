"""Blocks compressed at rest, each by itself, so that any of them can be read alone.

How a home's blocks are packed is decided once, by the first blocks: see `decide`.
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
"""Blocks to decide by."""
_LEVEL = 3
_FRAME = zstandard.FRAME_HEADER
"""What a compressed block begins with; others begin with a block's own magic."""
_WORTH = 0.99
"""What a method may leave of the size of the simpler one, to be used in its place."""
_SAMPLE_BYTES = 32 << 20
_DICTIONARY_BYTES = 112 << 10


@dataclass(frozen=True, slots=True)
class Packing:
    """How blocks are stored: as they are, as zstd frames, or as frames that need the home's dictionary."""

    method: Method
    dictionary: bytes = b""
    """Empty unless that is the method."""

    def packer(self) -> Callable[[Rows], bytes | memoryview]:
        """What makes of a block what is stored: never more bytes than it has. For one thread."""
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
    """How to pack blocks like these, of which there are at least two.

    zstd, if it saves at least 1 %; with a dictionary trained on every second of them, if that saves at least 1 % more
    of the others.
    """
    blocks = _some(blocks)
    held_out = blocks[1::2]
    best, size = PLAIN, _size(PLAIN, held_out)
    for candidate in (ZSTD, _trained(blocks[::2])):
        if candidate is not None and (smaller := _size(candidate, held_out)) <= _WORTH * size:
            best, size = candidate, smaller
    return best


def load_dictionary(dictionary: bytes | memoryview) -> zstandard.ZstdCompressionDict | None:
    """The dictionary, of which any number of threads may make use. Raises `ValueError` if it is none."""
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
    """The number of the dictionary that a stored block needs; 0 for one that needs none, or is damaged."""
    if stored[: len(_FRAME)] != _FRAME:
        return 0
    try:
        return zstandard.get_frame_parameters(stored).dict_id
    except zstandard.ZstdError:
        return 0


def unpack(stored: memoryview, slot_bytes: int, dictionary: zstandard.ZstdCompressionDict | None = None) -> Rows:
    """The block that was stored, however it was; nothing (which no check lets pass) for a frame that is damaged.

    A frame that does not say that it holds at most a slot is damaged, and so is one that needs another dictionary.
    It is not decompressed to find out.
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
    """As many as may be looked at, evenly spread, but some."""
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
