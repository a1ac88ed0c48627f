"""`Level`: one step of a residual quantiser, and the bytes of its codes, which are those of faiss.

A level cuts a vector into parts and states for each the number of one of ``2**bits`` centroids. The numbers follow
each other as a little-endian string of bits, the first part in the lowest bits, filled up to whole bytes; the bytes of
a vector are those of its levels, one after the other. faiss writes the same: `ProductQuantizer` by its `PQEncoder`
(impl/ProductQuantizer-inl.h), `Index2Layer` the list number of a `MultiIndexQuantizer`.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from m3runtime.errors import CodecError

BITS = range(8, 17)
_LEVEL = re.compile(r"\s*([0-9]{1,4})\s*x\s*([0-9]{1,2})\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Level:
    """So many equal parts of a vector, each with ``2**bits`` centroids."""

    parts: int
    bits: int

    def __str__(self) -> str:
        return f"{self.parts}x{self.bits}"

    @property
    def centroids(self) -> int:
        """Centroids of each part."""
        return 1 << self.bits

    @property
    def bytes(self) -> int:
        """Bytes of the code of one vector."""
        return (self.parts * self.bits + 7) // 8

    def places(self, groups: int, dim: int) -> Tensor:
        """The parts of all groups as `m3runtime.codecs.product.kernels.nearest` takes them, ``int64[parts, 3]``."""
        part = torch.arange(groups * self.parts)
        return torch.stack([part // self.parts, part % self.parts * (dim // self.parts), part], 1)


def parse(text: object, name: str, head_dim: int) -> tuple[Level, ...]:
    """Levels of a text such as ``16x8`` or ``2x14+8x10``: parts x bits, each of what those before it left over.

    Raises `CodecError` that calls the option ``name`` if it is none, or does not fit vectors of ``head_dim``.
    """
    levels = []
    for piece in text.split("+") if isinstance(text, str) else ["?"]:
        match = _LEVEL.fullmatch(piece)
        if not match:
            raise CodecError(f"{name} must be levels PARTSxBITS such as 16x8 or 2x14+8x10, not {text!r}")
        level = Level(int(match[1]), int(match[2]))
        if level.bits not in BITS:
            raise CodecError(
                f"{name}: a level has {BITS[0]} to {BITS[-1]} bits, not {level.bits} as in {piece.strip()}"
            )
        if not level.parts or head_dim % level.parts:
            raise CodecError(f"{name}: the parts of a level must divide head_dim {head_dim}, not as in {piece.strip()}")
        levels.append(level)
    return tuple(levels)


def text_of(levels: Sequence[Level]) -> str:
    """The text that `parse` reads."""
    return "+".join(map(str, levels))


def of_levels(codes: Tensor, levels: Sequence[Level]) -> Iterator[Tensor]:
    """The bytes of each level, views of ``uint8[..., bytes of all levels]``."""
    at = 0
    for level in levels:
        yield codes[..., at : at + level.bytes]
        at += level.bytes


def pack(numbers: Tensor, level: Level, out: Tensor) -> None:
    """Write centroid numbers, ``[..., parts]`` of any integers, to ``out``, ``uint8[..., level.bytes]``."""
    if level.bits == 8:
        out.copy_(numbers)
        return
    packed = torch.zeros(out.shape, dtype=torch.int64, device=numbers.device)
    for part, (byte, shift) in enumerate(_places(level)):
        moved = numbers[..., part].to(torch.int64) << shift
        for i in range(min(3, level.bytes - byte)):
            packed[..., byte + i] |= (moved >> (8 * i)) & 0xFF
    out.copy_(packed)


def unpack(codes: Tensor, level: Level) -> Tensor:
    """Undo `pack`: ``[..., parts]``, ``uint8`` (a view) for levels of 8 bits and ``int64`` otherwise.

    Any bytes give numbers below ``2**bits``.
    """
    if level.bits == 8:
        return codes
    # A number of up to 16 bits lies in three bytes at most; beyond the last byte there are zeros.
    wide = torch.nn.functional.pad(codes.to(torch.int64), (0, 2))
    places = torch.tensor(_places(level), device=codes.device)
    byte, shift = places[:, 0], places[:, 1]
    three = wide[..., byte] | wide[..., byte + 1] << 8 | wide[..., byte + 2] << 16
    return (three >> shift) & (level.centroids - 1)


def _places(level: Level) -> list[tuple[int, int]]:
    """The byte in which each part's number begins, and the bit in that byte."""
    return [divmod(part * level.bits, 8) for part in range(level.parts)]
