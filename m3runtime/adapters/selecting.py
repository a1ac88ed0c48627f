"""`TokenScoring`: an adapter that says how much attention each token of a reference receives.

An adapter needs no import to be one: it has the method.
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from m3runtime.memory.tensors import MemoryTensors


@runtime_checkable
class TokenScoring(Protocol):
    """An adapter whose tokens can be kept by their scores."""

    def encode_scored(self, references: Sequence[str]) -> tuple[MemoryTensors, Tensor]:
        """Memories of all tokens of one batch, and the scores that ``memory.select_by`` names.

        The scores are ``float32[n, layers, kv_heads, T]``, zero beyond a reference's tokens. Raises `InputError` as
        `m3runtime.adapters.base.Adapter.encode`, and `ConfigError` for a model whose tokens cannot be scored.
        """
