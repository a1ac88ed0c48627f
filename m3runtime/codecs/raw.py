"""The `raw` codec: values as they are, in one floating-point type."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from m3runtime.codecs import layout
from m3runtime.codecs.base import Codec
from m3runtime.codecs.kept import KeptBytes
from m3runtime.errors import BlockError, CodecError
from m3runtime.memory.spec import DTYPES, MemorySpec
from m3runtime.memory.tensors import MemoryTensors


class RawCodec(Codec):
    """Stores values as ``dtype``: lossless if that is the spec's, which is the default.

    Nothing is trained. Thread-safe. Raises `CodecError` for a ``dtype`` that no spec can have.
    """

    kind: ClassVar[str] = "raw"

    def __init__(self, spec: MemorySpec, dtype: str | None = None) -> None:
        super().__init__(spec)
        self.dtype = spec.dtype if dtype is None else dtype
        if self.dtype not in DTYPES:
            raise CodecError(f"dtype of the raw codec must be one of {', '.join(DTYPES)}, not {self.dtype!r}")
        self._dtype: torch.dtype = getattr(torch, self.dtype)
        vector: int = spec.head_dim * self._dtype.itemsize
        self._key_bytes, self._value_bytes = (len(places) * vector for places in spec.places)
        self._kept = KeptBytes.of(spec, 0, torch.tensor([*spec.places[0], *spec.places[1]]).repeat_interleave(vector))

    @property
    def options(self) -> Mapping[str, Any]:
        """``dtype``, stated even where it is the spec's."""
        return {"dtype": self.dtype}

    def payload_bytes(self, tokens: int) -> int:
        """Bytes of the payload of so many tokens: see `Codec.payload_bytes`."""
        if self._kept is not None:
            return self._kept.payload_bytes(tokens)
        return self._whole_bytes(tokens)

    def _whole_bytes(self, tokens: int) -> int:
        return tokens * (self._key_bytes + self._value_bytes)

    def encode(self, memories: MemoryTensors) -> Tensor:
        """Payloads of memories, ``uint8[n, bytes]`` on the CPU: see `Codec.encode`.

        Raises `CodecError` also for a value too large for ``dtype``.
        """
        memories.check(self.spec)
        memories = layout.on_cpu(memories)
        rows = torch.zeros(len(memories), self._whole_bytes(self.spec.tokens), dtype=torch.uint8)
        for i, row in enumerate(rows):
            both = torch.cat(layout.existing(layout.vectors(memories, i, self.spec), self.spec)).to("cpu", self._dtype)
            if not layout.finite(both):
                raise CodecError(f"memory {i} of the batch has values too large for {self.dtype}")
            payload = both.transpose(0, 1).contiguous().view(torch.uint8).flatten()
            row[: len(payload)] = payload
        return rows if self._kept is None else self._kept.narrow(rows)

    def decode(self, payloads: Tensor, tokens: Tensor, dtype: torch.dtype) -> MemoryTensors:
        """Memories of payloads, on the payloads' device: see `Codec.decode`.

        Raises `BlockError` if a memory holds a value that is not finite.
        """
        width = layout.width_of(payloads, tokens, self)
        if self._kept is not None:
            payloads = self._kept.widen(payloads, width)

        def values_of(codes: Tensor) -> Tensor:  # uint8[n, width, bytes] -> [n, vectors, width, dim]
            # The clone is aligned, whatever the slot was; only aligned bytes can be viewed as floats.
            x = codes.clone(memory_format=torch.contiguous_format).view(self._dtype)
            x = torch.unflatten(x, 2, (-1, self.spec.head_dim))
            x = x.transpose(1, 2).contiguous()
            if not layout.finite(layout.blank(x, tokens)):
                raise BlockError("a payload of the raw codec holds values that are not finite")
            return x

        keys, values = map(values_of, layout.split(payloads, width, 0, self._key_bytes, self._value_bytes))
        keys, values = layout.filled_up(keys, values, self.spec)
        if self._kept is not None:
            self._kept.blank(keys, values)
        return layout.finish(keys, values, tokens, self.spec, dtype, torch.finfo(self._dtype).max)
