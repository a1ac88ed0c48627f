"""The base of a codec's laws: how to make one, and memories to encode."""

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from m3runtime.codecs.base import Codec
from m3runtime.codecs.files import Distortion
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors, kept

SPEC = MemorySpec(layers=(0, 2, 3), kv_heads=2, tokens=12, head_dim=16, reference_tokens=12, dtype="float32")
OTHER_SPECS = (
    MemorySpec(layers=(0, 2), kv_heads=2, tokens=12, head_dim=16, reference_tokens=12, dtype="float32"),
    MemorySpec(layers=(0, 2, 4), kv_heads=2, tokens=12, head_dim=16, reference_tokens=12, dtype="float32"),
    MemorySpec(layers=(0, 2, 3), kv_heads=2, tokens=12, head_dim=16, reference_tokens=12, dtype="float16"),
)
UNEVEN = replace(SPEC, budgets=((12, 3), (5, 12), (1, 7)))
"""Heads that keep different numbers of tokens."""
OUT = (torch.float32, torch.float16, torch.bfloat16)


def make_memories(tokens: list[int], seed: int = 0, spec: MemorySpec = SPEC) -> MemoryTensors:
    """Random memories of so many tokens each, with an offset for each channel as keys have it.

    What lies beyond a memory's tokens, or beyond those that a head keeps, is NaN: whoever reads it is found out.
    """
    random = torch.Generator().manual_seed(seed)
    shape = (len(tokens), len(spec.layers), spec.kv_heads, max(tokens, default=0), spec.head_dim)
    channels = torch.randn(2, 1, *shape[1:3], 1, shape[4], generator=torch.Generator().manual_seed(7))
    keys, values = channels * torch.tensor([3.0, 0.5]).view(2, 1, 1, 1, 1, 1) + torch.randn(2, *shape, generator=random)
    for i, own in enumerate(tokens):
        keys[i, :, :, own:] = values[i, :, :, own:] = torch.nan
    lacking = ~kept(spec, shape[3])
    keys[:, lacking] = values[:, lacking] = torch.nan
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return MemoryTensors(keys.to(dtype), values.to(dtype), torch.tensor(tokens, dtype=torch.int64))


def rows(memories: MemoryTensors, which: slice) -> MemoryTensors:
    """Some of these memories."""
    return MemoryTensors(memories.keys[which], memories.values[which], memories.tokens[which])


def identical(a: MemoryTensors, b: MemoryTensors) -> bool:
    """True if two batches are equal bit by bit."""
    same = torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    return same and torch.equal(a.tokens, b.tokens) and a.keys.dtype == b.keys.dtype


def noise(count: int, size: int, seed: int) -> Tensor:
    """``uint8[count, size]``, any bytes."""
    return torch.randint(0, 256, (count, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


class CodecLaws(ABC):
    """The base of the themes that `CodecContract` joins.

    A subclass makes the codec, and says how much of a random memory it may lose.
    """

    spec: ClassVar[MemorySpec] = SPEC
    """The spec of the memories. With `UNEVEN`, heads keep different numbers of tokens: subclass twice to try both."""

    trains: ClassVar[bool] = False
    """True if the codec must be trained before use."""
    worst: ClassVar[Distortion]
    """The most distortion on the memories of `make_memories`, white noise on an offset: the hardest to encode."""

    @classmethod
    @abstractmethod
    def make(cls, spec: MemorySpec) -> Codec:
        """A new codec, not trained."""

    @classmethod
    def fitted(cls) -> Codec:
        """A new codec, trained on a sample that is always the same."""
        codec = cls.make(cls.spec)
        codec.fit(cls.memories([12, 9, 12, 7] * 12, seed=1))
        return codec

    @classmethod
    def memories(cls, tokens: list[int], seed: int = 0) -> MemoryTensors:
        """Random memories of the spec: see `make_memories`."""
        return make_memories(tokens, seed, cls.spec)

    @pytest.fixture(scope="class")
    @classmethod
    def codec(cls) -> Codec:
        """A trained codec that no test changes."""
        return cls.fitted()
