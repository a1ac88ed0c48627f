"""Decoding of a transform as one Triton kernel, for CUDA devices. Imported when first used, where Triton is installed.

A program makes one tile: some tokens of one memory, by some channels of one unit. It gathers the coordinates that codes
stand for, a few at a time, and multiplies them by the inverse transform. Tiles are always of the same shape, and sums
are of float32 in one order (never of TF32, which tensor cores would take), so what a token decodes to depends neither
on the batch nor on the width, and is what torch makes of it, to rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from m3runtime.codecs.product.transform import CENTROIDS, Transform, kept_by

_TOKENS = 32
"""Tokens of a tile."""
_CHANNELS = 128
"""Channels of a tile, at most."""
_COORDINATES = 16
"""Multiplied at a time. For twice as many, Triton 3.9 takes 255 registers a thread instead of 128."""
_LEAST = 16
"""Rows and columns of the smallest product that Triton makes."""


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
        self._table = torch.cat([table.flatten() for table in transform.tables])
        self._inverse, self._mean = transform.inverse.contiguous(), transform.mean.contiguous()
        # Of each channel of a unit, where it belongs among a token's keys of all heads and then its values.
        one = (units.heads, 1, units.spec.head_dim)
        target = torch.arange(units.count * units.channels, dtype=torch.int32).view(2, *one)
        self._target = units.joined(target[0], target[1]).contiguous().to(device)
        self._units, self._channels, self._token_bytes = units.count, units.channels, len(transform.parts)
        self._tile = min(_CHANNELS, max(_LEAST, triton.next_power_of_2(self._channels)))

        keys, values = (torch.empty(1, *one, device=device) for _ in range(2))
        self(torch.zeros(1, self._token_bytes, dtype=torch.uint8, device=device), keys, values)

    def __call__(self, payloads: Tensor, keys: Tensor, values: Tensor) -> None:
        """Decode ``uint8[n, at least width * token_bytes]`` into two contiguous ``[n, heads, width, head_dim]``.

        These are of any floating type, and all on the transform's device. Payloads need not be aligned. Nothing waits
        for the device.
        """
        n, heads, width, head_dim = keys.shape
        if not n * width:
            return
        if payloads.stride(1) != 1:
            payloads = payloads.contiguous()
        grid = (n * triton.cdiv(width, _TOKENS), self._units * triton.cdiv(self._channels, self._tile))
        with torch.cuda.device(payloads.get_device()):  # Triton launches on the current one
            decode_tile[grid](
                payloads,
                payloads.stride(0),
                width,
                self._bounds,
                self._bytes,
                self._sizes,
                self._starts,
                self._table,
                self._inverse,
                self._mean,
                self._target,
                keys,
                values,
                TOKEN_BYTES=self._token_bytes,
                HEADS=heads,
                HEAD_DIM=head_dim,
                CHANNELS=self._channels,
                TILE_TOKENS=_TOKENS,
                TILE_CHANNELS=self._tile,
                STEP=_COORDINATES,
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
    table,  # float32
    inverse,  # float32[rows, CHANNELS]
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
