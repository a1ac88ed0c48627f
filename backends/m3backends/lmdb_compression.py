"""Blocks compressed at rest, each by itself, so that any of them can be read alone."""

from typing import Literal

import numpy as np
import zstandard

from m3runtime.block import Rows

Compression = Literal["none", "zstd"]

_LEVEL = 3
_FRAME = zstandard.FRAME_HEADER
"""What a compressed block begins with; others begin with a block's own magic."""


def pack(block: Rows, compression: Compression) -> bytes | memoryview:
    """What is stored of a block: a zstd frame if that is asked for and smaller, else the block."""
    if compression == "zstd":
        # A context for each: they may not be shared by threads, and cost little beside the block.
        frame = zstandard.ZstdCompressor(level=_LEVEL).compress(block.data)
        if len(frame) < len(block):
            return frame
    return block.data


def unpack(stored: memoryview, slot_bytes: int) -> Rows:
    """The block that was stored, however it was; nothing (which no check lets pass) for a frame that is damaged.

    A frame that says it holds more than a slot is damaged: it is not decompressed to find out.
    """
    if stored[: len(_FRAME)] != _FRAME:
        return np.asarray(stored)
    try:
        size = zstandard.frame_content_size(stored)
        content = zstandard.ZstdDecompressor().decompress(stored) if 0 < size <= slot_bytes else b""
    except zstandard.ZstdError:
        content = b""
    return np.frombuffer(content, np.uint8)
