"""Optional abilities of an adapter, each a protocol. The runtime uses an ability where an adapter has it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from m3runtime.memory.shape import ModelShape

if TYPE_CHECKING:
    import torch

    from m3runtime.config.schema import MemoryConfig, ModelConfig


@runtime_checkable
class Weighing(Protocol):
    """An adapter that knows what errors in its memories cost. Codecs that learn give their bytes where it is most."""

    def importance(self, references: Sequence[str]) -> "torch.Tensor":
        """What an error in a token's keys and values costs, on average over these references.

        ``float32[layers, n, n]`` on the CPU, ``n`` of ``2 * kv_heads * head_dim``: symmetric matrices over keys of all
        heads, then values. See `m3runtime.codecs.base.Codec.fit`. Raises `InputError` as `Adapter.encode` does.
        """


@runtime_checkable
class Sizing(Protocol):
    """What the class of an adapter has that can tell a model's shape without loading it."""

    def shape(self, model: "ModelConfig") -> ModelShape:
        """From what is written beside the weights. Raises `ConfigError` with one line if it cannot be told."""

    def carried(self, model: "ModelConfig", memory: "MemoryConfig") -> "MemoryConfig":
        """The memory settings in force: a model that was trained to read memories carries its own."""
