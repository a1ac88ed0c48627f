"""Decoding of a transform as one Triton kernel, for CUDA devices. Imported when first used, where Triton is installed.

A program makes one tile: some tokens of one memory, by some channels of one unit. It gathers the coordinates that codes
stand for, a few at a time, and multiplies them by the inverse transform. Tiles are always of the same shape, and sums
are of float32 in one order, so what a token decodes to depends neither on the batch nor on the width.

To float32, products are of float32 (never of TF32), and the result is what torch makes of it, to rounding. To a smaller
type, matrix units multiply numbers that are rounded to bfloat16 (`UNITS_TOLERANCE`): ten times as fast, and as exact as
bfloat16.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3runtime.codecs.product.transform import CENTROIDS, Transform, kept_by

UNITS_TOLERANCE = 2**-8
"""The most that a memory by matrix units differs from one of float32, as a share of its norm, before it is rounded to
its own type: both numbers of each product are off by up to 2**-9 of themselves. Seen: 0.0023."""
_LEAST = 16
"""Rows and columns of the smallest product that Triton makes."""
_UNITS_SINCE = (8, 0)
"""The compute capability from which matrix units multiply bfloat16."""


@dataclass(frozen=True, slots=True)
class Tile:
    """What one program makes."""

    tokens: int
    channels: int
    coordinates: int
    """Multiplied at a time."""
    warps: int


# For twice as many coordinates, Triton 3.9 takes 255 registers a thread instead of 128 (plain), and up to 246 instead
# of 168 (units, compiled for an H100): fewer programs share a multiprocessor.
_PLAIN = Tile(32, 128, 16, 4)
_UNITS = Tile(64, 128, 32, 4)
_WIDE_UNITS = Tile(64, 256, 32, 8)
"""Gathers coordinates half as often; for units that it cuts without a rest."""
_SHORT_UNITS = Tile(16, 128, 64, 4)
"""For memories of few tokens."""


class TritonDecoder:
    """Decodes the codes of one transform on its device. Immutable, so any thread may use it.

    Construction compiles the kernel and runs it once. It raises what Triton raises, of many types, where that has no
    compiler or does not know the device.
    """

    def __init__(self, transform: Transform) -> None:
        units, device = transform.units, transform.mean.device
        unit, first, size = transform.parts.long().unbind(1)
        kept = torch.tensor(kept_by(transform.parts, units.count))
        bounds = torch.cat([kept.new_zeros(1), kept.cumsum(0)])
        # Coordinates in the order of codes: of which part each is, and where in it; and its row of the inverse.
        before = size.cumsum(0) - size
        part = torch.repeat_interleave(torch.arange(len(size)), size)
        within = torch.arange(len(part)) - before[part]
        row = bounds[unit[part]] + first[part] + within
        # Of each row of the inverse: byte of a token, floats of its centroids (0 where no part covers it), and where
        # its number stands in the first of them.
        places = torch.zeros(3, int(bounds[-1]), dtype=torch.int32)
        for place, found in zip(places, (part, size[part], CENTROIDS * before[part] + within), strict=True):
            place[row] = found.int()
        self._bounds = bounds.int().to(device)
        self._bytes, self._sizes, self._starts = places.to(device)
        self._mean = transform.mean.contiguous()
        table, inverse = torch.cat([table.flatten() for table in transform.tables]), transform.inverse.contiguous()
        most = max(_LEAST, triton.next_power_of_2(units.channels))
        self._plain = (table, inverse, replace(_PLAIN, channels=min(_PLAIN.channels, most)))
        self._units_of = None
        if device.type != "cuda" or torch.cuda.get_device_capability(device) >= _UNITS_SINCE:
            tile = _WIDE_UNITS if units.channels % _WIDE_UNITS.channels == 0 else _UNITS
            tile = _SHORT_UNITS if units.spec.tokens <= _SHORT_UNITS.tokens else tile
            small = replace(tile, channels=min(tile.channels, most))
            self._units_of = (table.bfloat16(), inverse.bfloat16(), small)
        # Of each channel of a unit, where it belongs among a token's keys of all heads and then its values.
        one = (units.heads, 1, units.spec.head_dim)
        target = torch.arange(units.count * units.channels, dtype=torch.int32).view(2, *one)
        self._target = units.joined(target[0], target[1]).contiguous().to(device)
        self._units, self._channels, self._token_bytes = units.count, units.channels, len(transform.parts)

        for dtype in (torch.float32, torch.bfloat16):
            keys, values = (torch.empty(1, *one, device=device, dtype=dtype) for _ in range(2))
            self(torch.zeros(1, self._token_bytes, dtype=torch.uint8, device=device), keys, values)

    def __call__(self, payloads: Tensor, keys: Tensor, values: Tensor) -> None:
        """Decode ``uint8[n, at least width * token_bytes]`` into two contiguous ``[n, heads, width, head_dim]``.

        These are of one floating type, and all on the transform's device. Payloads need not be aligned. Nothing waits
        for the device.
        """
        n, heads, width, head_dim = keys.shape
        if not n * width:
            return
        if payloads.stride(1) != 1:
            payloads = payloads.contiguous()
        use = self._plain if keys.dtype.itemsize > 2 else self._units_of or self._plain
        table, inverse, tile = use
        grid = (n * triton.cdiv(width, tile.tokens), self._units * triton.cdiv(self._channels, tile.channels))
        with torch.cuda.device(payloads.get_device()):  # Triton launches on the current one
            decode_tile[grid](
                payloads,
                payloads.stride(0),
                width,
                self._bounds,
                self._bytes,
                self._sizes,
                self._starts,
                table,
                inverse,
                self._mean,
                self._target,
                keys,
                values,
                TOKEN_BYTES=self._token_bytes,
                HEADS=heads,
                HEAD_DIM=head_dim,
                CHANNELS=self._channels,
                TILE_TOKENS=tile.tokens,
                TILE_CHANNELS=tile.channels,
                STEP=tile.coordinates,
                WIDENS=not payloads.is_cuda,
                num_warps=tile.warps,
                enable_fp_fusion=True,
            )


# Compiled once for each codec and device: neither a batch's row length nor its width is looked at while compiling, nor
# whether its bytes are aligned.
@triton.jit(do_not_specialize=["payloads", "row_bytes", "width"])  # type: ignore[untyped-decorator]
def decode_tile(  # type: ignore[no-untyped-def] # what is written as a type is compiled, too
    payloads,  # uint8, rows of row_bytes
    row_bytes,
    width,  # tokens
    bounds,  # int32[units + 1]: rows of the inverse at which units begin and end
    positions,  # int32[rows]: the byte of a token that is the row's code
    sizes,  # int32[rows]: floats of a centroid; 0 for a coordinate that is always zero
    starts,  # int32[rows]: where the coordinate of centroid 0 is in the table
    table,  # float32, or bfloat16 for matrix units
    inverse,  # of the same type, [rows, CHANNELS]
    mean,  # float32[units, CHANNELS]
    target,  # int32[units, CHANNELS]: place among keys, then values, HEADS * HEAD_DIM of each
    keys,  # [n, HEADS, width, HEAD_DIM]
    values,
    TOKEN_BYTES: tl.constexpr,  # noqa: N803 - constants of the compilation, by the convention of Triton
    HEADS: tl.constexpr,  # noqa: N803
    HEAD_DIM: tl.constexpr,  # noqa: N803
    CHANNELS: tl.constexpr,  # noqa: N803
    TILE_TOKENS: tl.constexpr,  # noqa: N803
    TILE_CHANNELS: tl.constexpr,  # noqa: N803
    STEP: tl.constexpr,  # noqa: N803
    WIDENS: tl.constexpr,  # noqa: N803 - in Triton's interpreter, which multiplies no bfloat16; the products are equal
):
    """Programs: tiles of all memories' tokens, by tiles of all units' channels."""
    tiles = tl.cdiv(width, TILE_TOKENS)
    memory = (tl.program_id(0) // tiles).to(tl.int64)  # what it is multiplied by may exceed 31 bits
    token = tl.program_id(0) % tiles * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    unit = tl.program_id(1) // tl.cdiv(CHANNELS, TILE_CHANNELS)
    channel = tl.program_id(1) % tl.cdiv(CHANNELS, TILE_CHANNELS) * TILE_CHANNELS + tl.arange(0, TILE_CHANNELS)
    token_exists, channel_exists = token < width, channel < CHANNELS

    codes = payloads + memory * row_bytes + token[:, None] * TOKEN_BYTES
    end = tl.load(bounds + unit + 1)
    total = tl.zeros((TILE_TOKENS, TILE_CHANNELS), tl.float32)
    for start in range(tl.load(bounds + unit), end, STEP):
        row = start + tl.arange(0, STEP)
        kept = row < end
        size = tl.load(sizes + row, mask=kept, other=0)
        position = tl.load(positions + row, mask=kept, other=0)
        first = tl.load(starts + row, mask=kept, other=0)
        coded = token_exists[:, None] & (size > 0)[None, :]
        code = tl.load(codes + position[None, :], mask=coded, other=0).to(tl.int32)
        coordinates = tl.load(table + first[None, :] + code * size[None, :], mask=coded, other=0.0)
        rows = inverse + row.to(tl.int64)[:, None] * CHANNELS + channel[None, :]
        transform = tl.load(rows, mask=kept[:, None] & channel_exists[None, :], other=0.0)
        if WIDENS:
            coordinates, transform = coordinates.to(tl.float32), transform.to(tl.float32)
        total = tl.dot(coordinates, transform, total, input_precision="ieee")
    total += tl.load(mean + unit * CHANNELS + channel, mask=channel_exists, other=0.0)[None, :]

    place = tl.load(target + unit * CHANNELS + channel, mask=channel_exists, other=0)
    is_key = place < HEADS * HEAD_DIM
    place = tl.where(is_key, place, place - HEADS * HEAD_DIM)
    at = (memory * HEADS + place // HEAD_DIM)[None, :] * width
    at = (at + token[:, None]) * HEAD_DIM + (place % HEAD_DIM)[None, :]
    exists = token_exists[:, None] & channel_exists[None, :]
    tl.store(keys + at, total, mask=exists & is_key[None, :])
    tl.store(values + at, total, mask=exists & ~is_key[None, :])
