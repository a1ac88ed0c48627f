"""The buffers of `MemoryCache`, and the layers of a cache by which a transformers model reads and writes them."""

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from m3model.attention.layout import Pair


class LayerStack:
    """Buffers of layers that are alike, ``[layers, B, kv_heads, columns, head_dim]``; layers have views of them.

    Writing a memory to all layers is two strided copies, and not two for each layer: two thirds of the time on a CPU,
    and on a GPU two launches instead of dozens.
    """

    def __init__(self, layers: list[int], *, region: bool) -> None:
        self.layers = layers
        self.region = region
        """True for the layers with memories."""
        self.keys = self.values = torch.empty(0)
        self.first = self.next = 0
        """Columns that the current forward pass reads from, and writes to."""
        self.context = 0
        """Columns of context before the current forward pass."""


class BufferLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # its __init_subclass__ is untyped
    """One layer's buffers, ``[B, kv_heads, region + sink + context, head_dim]``."""

    keys: Tensor
    values: Tensor

    def __init__(self, stack: LayerStack) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stack = stack
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> Pair:
        """Write the new columns, and return all that this layer's attention reads."""
        first, start, length = self.stack.first, self.stack.next, key_states.shape[2]
        self.keys.narrow(2, start, length).copy_(key_states)
        self.values.narrow(2, start, length).copy_(value_states)
        count = start + length - first
        return self.keys.narrow(2, first, count), self.values.narrow(2, first, count)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers are allocated from the start."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of columns that attention reads, and their offset."""
        return self.stack.next - self.stack.first + query_length, 0

    def get_seq_length(self) -> int:
        """The number of columns of context so far."""
        return self.stack.context

    def get_max_length(self) -> int:
        """No bound: the buffers grow."""
        return -1
