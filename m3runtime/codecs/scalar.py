"""The `scalar` codec: uniform steps for each channel, with a range of its own in every memory."""

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from m3runtime.codecs import layout
from m3runtime.codecs.base import Codec
from m3runtime.codecs.kept import KeptBytes
from m3runtime.errors import BlockError, CodecError
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors

_HALF_BYTES = 2
_PEAK = 256 * float(np.finfo(np.float16).max)
"""No decoded value exceeds it: a float16 and 255 float16 steps."""


class ScalarCodec(Codec):
    """Stores each channel of each layer and KV head in 4 or 8 bits, between its least and greatest value.

    The range is over the memory's own tokens and lies in the payload's fixed part as float16, rounded
    outwards: ``[low, step] x vectors x head_dim`` of the keys, then of the values. Two codes of four bits share a
    byte, the even channel in its low half. ``key_bits`` and ``value_bits`` override ``bits``. Nothing is
    trained. Thread-safe.
    """

    kind: ClassVar[str] = "scalar"

    def __init__(
        self, spec: MemorySpec, bits: int = 8, key_bits: int | None = None, value_bits: int | None = None
    ) -> None:
        super().__init__(spec)
        self.key_bits = bits if key_bits is None else key_bits
        self.value_bits = bits if value_bits is None else value_bits
        for found in (self.key_bits, self.value_bits):
            if type(found) is not int or found not in (4, 8):
                raise CodecError(f"bits of the scalar codec must be 4 or 8, not {found!r}")
        keys, values = map(len, spec.places)
        self._ranges = [2 * keys * spec.head_dim, 2 * values * spec.head_dim]  # numbers of keys, and of values
        self._key_bytes = keys * _packed_bytes(spec.head_dim, self.key_bits)
        self._value_bytes = values * _packed_bytes(spec.head_dim, self.value_bits)
        owners = [
            torch.tensor(places).repeat_interleave(_packed_bytes(spec.head_dim, of))
            for places, of in zip(spec.places, (self.key_bits, self.value_bits), strict=True)
        ]
        self._kept = KeptBytes.of(spec, self._fixed_bytes, torch.cat(owners))

    @property
    def options(self) -> Mapping[str, Any]:
        """``key_bits`` and ``value_bits``."""
        return {"key_bits": self.key_bits, "value_bits": self.value_bits}

    @property
    def _fixed_bytes(self) -> int:
        return sum(self._ranges) * _HALF_BYTES

    def payload_bytes(self, tokens: int) -> int:
        """Bytes of the payload of so many tokens: see `Codec.payload_bytes`."""
        if self._kept is not None:
            return self._kept.payload_bytes(tokens)
        return self._whole_bytes(tokens)

    def _whole_bytes(self, tokens: int) -> int:
        return self._fixed_bytes + tokens * (self._key_bytes + self._value_bytes)

    def encode(self, memories: MemoryTensors) -> Tensor:
        """Payloads of memories, ``uint8[n, bytes]`` on the CPU: see `Codec.encode`.

        Raises `CodecError` also for a value too large for a float16.
        """
        memories.check(self.spec)
        memories = layout.on_cpu(memories)
        rows = torch.zeros(len(memories), self._whole_bytes(self.spec.tokens), dtype=torch.uint8)
        for i, row in enumerate(rows):
            ranges, codes = [], []
            pair = layout.existing(layout.vectors(memories, i, self.spec), self.spec)
            for x, bits in zip(pair, (self.key_bits, self.value_bits), strict=True):
                scale, code = _quantise(x.cpu(), bits)
                if not layout.finite(scale):
                    raise CodecError(f"memory {i} of the batch has values too large for the scalar codec")
                ranges.append(scale.view(torch.uint8).flatten())
                codes.append(_pack(code, bits).transpose(0, 1).flatten(1))
            payload = torch.cat([*ranges, torch.cat(codes, 1).flatten()])
            row[: len(payload)] = payload
        return rows if self._kept is None else self._kept.narrow(rows)

    def decode(self, payloads: Tensor, tokens: Tensor, dtype: torch.dtype) -> MemoryTensors:
        """Memories of payloads, on the payloads' device: see `Codec.decode`.

        Raises `BlockError` if a range is not finite.
        """
        width = layout.width_of(payloads, tokens, self)
        if self._kept is not None:
            payloads = self._kept.widen(payloads, width)
        fixed = payloads[:, : self._fixed_bytes].clone(memory_format=torch.contiguous_format).view(torch.float16)
        if not layout.finite(fixed):
            raise BlockError("a payload of the scalar codec holds a range that is not finite")
        both = layout.split(payloads, width, self._fixed_bytes, self._key_bytes, self._value_bytes)
        pair = []
        ranges = torch.split(fixed, self._ranges, 1)
        for codes, scale, bits in zip(both, ranges, (self.key_bits, self.value_bits), strict=True):
            low, step = torch.unflatten(scale, 1, (2, -1, 1, self.spec.head_dim)).to(torch.float32).unbind(1)
            codes = torch.unflatten(codes, 2, (low.shape[1], -1)).transpose(1, 2)
            codes = _unpack(codes, bits)[..., : self.spec.head_dim]
            pair.append(codes.to(torch.float32, memory_format=torch.contiguous_format).mul_(step).add_(low))
        keys, values = layout.filled_up(pair[0], pair[1], self.spec)
        if self._kept is not None:
            self._kept.blank(keys, values)
        return layout.finish(keys, values, tokens, self.spec, dtype, _PEAK)


def _packed_bytes(channels: int, bits: int) -> int:
    return (channels * bits + 7) // 8


def _quantise(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Low and step ``float16[2, vectors, channels]``, and codes ``uint8[vectors, tokens, channels]``."""
    steps = 2**bits - 1
    low = _outwards(x.amin(1), -np.inf)
    step = _outwards((x.amax(1) - low.to(torch.float32)) / steps, np.inf)
    # A step of zero is that of a channel that does not vary: its code is 0 whatever it is divided by.
    wide = torch.where(step > 0, step, 1).to(torch.float32)
    codes = ((x - low.to(torch.float32)[:, None]) / wide[:, None]).round_().clamp_(0, steps)
    return torch.stack([low, step]), codes.to(torch.uint8)


def _outwards(x: Tensor, towards: float) -> Tensor:
    """The float16 next to each value, or beyond it: a range of them leaves no value out."""
    exact = x.numpy()
    with np.errstate(over="ignore"):  # the caller refuses infinity
        half = exact.astype(np.float16)
        beyond = half < exact if towards > 0 else half > exact
        return torch.from_numpy(np.where(beyond, np.nextafter(half, np.float16(towards)), half))


def _pack(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes
    codes = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., ::2] | codes[..., 1::2] << 4


def _unpack(codes: Tensor, bits: int) -> Tensor:
    if bits == 8:
        return codes
    return torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
