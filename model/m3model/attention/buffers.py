"""The buffers of `MemoryCache`, and the layers of a cache by which a transformers model reads and writes them."""

import torch
from torch import Tensor

from m3model.attention.layout import LayerGroup, Pair
from m3model.attention.stopping import StoringLayer


class LayerStack:
    """Buffers of layers that are alike, ``[layers, B, kv_heads, columns, head_dim]``; layers have views of them.

    Writing a memory to all layers is two strided copies, and not two for each layer: two thirds of the time on a CPU,
    and on a GPU two launches instead of dozens.
    """

    def __init__(self, group: LayerGroup) -> None:
        self.layers = group.layers
        self.group = group
        self.region = group.remembers
        """True for the layers with memories."""
        self.keys = self.values = torch.empty(0)
        self.first = self.next = 0
        """Columns that the current forward pass reads from, and writes to."""
        self.context = 0
        """Columns of context before the current forward pass."""


class BufferLayer(StoringLayer):
    """One layer's buffers, ``[B, kv_heads, region + sink + context, head_dim]``."""

    keys: Tensor
    values: Tensor

    def __init__(self, stack: LayerStack) -> None:
        super().__init__()
        self.stack = stack

    def store(self, keys: Tensor, values: Tensor) -> Pair:
        """Write the new columns, and return all that this layer's attention reads."""
        first, start, length = self.stack.first, self.stack.next, keys.shape[2]
        self.keys.narrow(2, start, length).copy_(keys)
        self.values.narrow(2, start, length).copy_(values)
        count = start + length - first
        return self.keys.narrow(2, first, count), self.values.narrow(2, first, count)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The number of columns that attention reads, and their offset."""
        return self.stack.next - self.stack.first + query_length, 0

    def get_seq_length(self) -> int:
        """The number of columns of context so far."""
        return self.stack.context
