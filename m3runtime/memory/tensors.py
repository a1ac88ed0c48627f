"""`MemoryTensors`: a batch of explicit memories as tensors, between an adapter and a codec."""

from dataclasses import dataclass

import torch
from torch import Tensor

from m3runtime.errors import CodecError
from m3runtime.memory.spec import MemorySpec


@dataclass(frozen=True, slots=True)
class MemoryTensors:
    """Keys and values of ``n`` memories.

    ``keys`` and ``values`` are ``[n, layers, kv_heads, tokens, head_dim]``, floating point, keys after RoPE at their
    in-reference position. ``tokens`` is ``int64[n]`` on the CPU: how many tokens of each memory exist. Rows are
    left-aligned; what lies beyond a memory's tokens has no meaning and must not be read. What a head does not have
    by `MemorySpec.budgets` is zero.
    """

    keys: Tensor
    values: Tensor
    tokens: Tensor

    def __post_init__(self) -> None:
        if self.keys.shape != self.values.shape or self.keys.ndim != 5:
            raise CodecError(f"keys {tuple(self.keys.shape)} and values {tuple(self.values.shape)} do not match")
        if self.tokens.shape != self.keys.shape[:1] or self.tokens.dtype != torch.int64:
            raise CodecError("tokens must be int64[n]")

    def __len__(self) -> int:
        return self.keys.shape[0]

    def rows(self, which: slice | list[int]) -> "MemoryTensors":
        """Some of these memories."""
        return MemoryTensors(self.keys[which], self.values[which], self.tokens[which])

    def exists(self) -> Tensor:
        """``bool[n, tokens]`` on the CPU: which tokens exist."""
        return torch.arange(self.keys.shape[3]) < self.tokens[:, None]

    def check(self, spec: MemorySpec) -> None:
        """Raise `CodecError` unless these memories have the shape of ``spec``."""
        _, layers, heads, tokens, dim = self.keys.shape
        if (layers, heads, dim) != (len(spec.layers), spec.kv_heads, spec.head_dim) or tokens > spec.tokens:
            raise CodecError(f"memories of shape {tuple(self.keys.shape)} do not fit {spec}")
        if len(self) and not 1 <= int(self.tokens.min()) <= int(self.tokens.max()) <= tokens:
            raise CodecError(f"a memory has between 1 and {tokens} tokens, not {self.tokens.tolist()}")


def budgets_of(spec: MemorySpec) -> Tensor:
    """The most tokens that each head keeps, ``int64[layers, kv_heads]`` on the CPU."""
    budgets = spec.budgets or ((spec.tokens,) * spec.kv_heads,) * len(spec.layers)
    return torch.tensor(budgets)


def kept(spec: MemorySpec, width: int) -> Tensor:
    """Which of the first ``width`` tokens each head can have, ``bool[layers, kv_heads, width]`` on the CPU."""
    return torch.arange(width) < budgets_of(spec)[..., None]
