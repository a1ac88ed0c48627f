"""Codecs with one mistake each."""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from m3runtime.codecs.base import Codec, Distortion
from m3runtime.codecs.raw import RawCodec
from m3runtime.errors import BlockError, CodecError
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.testing.codec import CodecContract
from tests.testing.broken.suites import make_suites


class Dithers(RawCodec):
    def encode(self, memories: MemoryTensors) -> Tensor:
        noise = 1e-6 * torch.randn(memories.keys.shape)
        return super().encode(MemoryTensors(memories.keys + noise, memories.values, memories.tokens))


class ScalesByTheBatch(RawCodec):
    def encode(self, memories: MemoryTensors) -> Tensor:
        scale = 1 + 1e-3 * len(memories)
        return super().encode(MemoryTensors(memories.keys * scale / 1.001, memories.values, memories.tokens))


class DecodesWhatIsNotFinite(RawCodec):
    def decode(self, payloads: Tensor, tokens: Tensor, dtype: torch.dtype) -> MemoryTensors:
        try:
            return super().decode(payloads, tokens, dtype)
        except BlockError as error:
            if "not finite" not in str(error):
                raise
            zeros = super().decode(torch.zeros_like(payloads), tokens, dtype)
            return MemoryTensors(zeros.keys + torch.nan, zeros.values, tokens)


class TakesADamagedFile(RawCodec):
    @classmethod
    def load(cls, path: Path, spec: MemorySpec) -> "RawCodec":
        try:
            return super().load(path, spec)
        except CodecError as error:
            if "digest" in str(error):
                return cls(spec)
            raise


class EncodesWhatIsNotFinite(RawCodec):
    def encode(self, memories: MemoryTensors) -> Tensor:
        return super().encode(MemoryTensors(memories.keys.nan_to_num(), memories.values.nan_to_num(), memories.tokens))


class LeavesNoiseInThePayload(RawCodec):
    def encode(self, memories: MemoryTensors) -> Tensor:
        payloads = super().encode(memories)
        for payload, tokens in zip(payloads, memories.tokens.tolist(), strict=True):
            payload[self.payload_bytes(tokens) :] = 0x5A
        return payloads


class ReadsBeyondTheTokens(RawCodec):
    """Decodes a slot to its end: what follows a short memory's payload becomes tokens."""

    def decode(self, payloads: Tensor, tokens: Tensor, dtype: torch.dtype) -> MemoryTensors:
        decoded = super().decode(payloads, tokens.max().expand(len(tokens)) if len(tokens) else tokens, dtype)
        return MemoryTensors(decoded.keys, decoded.values, tokens)


class Codecs(CodecContract):
    kind: ClassVar[type[RawCodec]]
    worst = Distortion(keys=0.0, values=0.0)

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return cls.kind(spec)


BROKEN = RawCodec.__subclasses__()
globals().update(make_suites(Codecs, __name__, RawCodec, BROKEN))
