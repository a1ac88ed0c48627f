"""Forward passes that gradients flow through: encoding references, and reading text with their memories.

Both run the model's own layers with the attention of `.implementation`, as a `Session` does. Where that writes into
buffers, these concatenate: nothing is overwritten that a backward pass asks for.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from m3model.attention.implementation import Masked
from m3model.attention.layout import Pair
from m3model.attention.stopping import StoringLayer


@dataclass(frozen=True, slots=True)
class ReadMemories:
    """The memories that the text of a batch reads, of all its chunks, one after the other."""

    parts: dict[int, Pair]
    """Keys and values of each memory layer, ``[B, kv_heads, M, head_dim]``."""
    seen: Tensor
    """The columns among M that each token of the text attends to, ``bool[B, T, M]``."""


class Pass(Masked, Cache):
    """One forward pass over ``[sink | text]``: what stands for a cache, in place of `MemoryCache`."""

    def __init__(self, layers: int, sink: int, valid: Tensor, positions: Tensor) -> None:
        """``valid`` is ``bool[B, T]``, which tokens are no padding; ``positions`` int64 ``[B, sink + T]``."""
        super().__init__(layers=[_Layer(self, layer) for layer in range(layers)])
        self.sink = sink
        self.valid = valid
        self.positions = positions
        self._masks: dict[tuple[int, int | None], Tensor] = {}

    @property
    def query_valid(self) -> Tensor:
        """The queries that are tokens of the text, ``bool[B, sink + T]``: neither the sink's nor padding."""
        return torch.nn.functional.pad(self.valid, (self.sink, 0))

    def take(self, layer: int, keys: Tensor, values: Tensor) -> Pair:
        """Keys and values that a layer's attention reads, given those of this pass, ``[B, kv_heads, Q, head_dim]``."""
        raise NotImplementedError

    def columns(self, before: int) -> Tensor:
        """The columns that each query sees of the ``before`` ones in front of the pass' own: ``bool[B, Q, before]``."""
        raise NotImplementedError

    def mask(self, keys: int, window: int | None) -> Tensor:
        """The mask added to the logits of ``keys`` columns, float32 ``[B, 1, Q, K]``: zero or -inf.

        The sink is seen in layers with a sliding window as well, and memories too.
        """
        if (keys, window) not in self._masks:
            seen = torch.cat([self.columns(keys - self.positions.shape[1]), self._causal(window)], dim=2)
            mask = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)
            self._masks[keys, window] = mask[:, None]
        return self._masks[keys, window]

    def _causal(self, window: int | None) -> Tensor:
        batch, length = self.positions.shape
        places = torch.arange(length, device=self.positions.device)
        seen = (places <= places[:, None]).expand(batch, -1, -1)
        if window is not None:
            near = self.positions[:, None, :] > self.positions[:, :, None] - window
            seen = seen & (near | (places < self.sink))
        # Padding sees itself, whatever it is: a softmax over nothing is 0/0.
        itself = places == places[:, None]
        return seen & (torch.nn.functional.pad(self.valid, (self.sink, 0), value=True)[:, None] | itself)


class EncodingPass(Pass):
    """References, each after the sink: keeps the keys and values of the memory layers, then raises `StoredError`."""

    def __init__(self, layers: int, sink: int, valid: Tensor, positions: Tensor, memory_layers: Sequence[int]) -> None:
        super().__init__(layers, sink, valid, positions)
        self.wanted = frozenset(memory_layers)
        self.kept: dict[int, Pair] = {}
        self.layers[max(memory_layers)].is_last = True  # type: ignore[union-attr]  # typed as any layer of the library

    def take(self, layer: int, keys: Tensor, values: Tensor) -> Pair:
        """Keep the memory layers."""
        if layer in self.wanted:
            self.kept[layer] = keys[:, :, self.sink :], values[:, :, self.sink :]
        return keys, values

    def columns(self, before: int) -> Tensor:
        """No column stands in front."""
        return self.valid.new_zeros(*self.positions.shape, before)


class ReadingPass(Pass):
    """Text after the sink, which may read memories."""

    def __init__(
        self, layers: int, sink: int, valid: Tensor, positions: Tensor, memories: ReadMemories | None = None
    ) -> None:
        super().__init__(layers, sink, valid, positions)
        self._memories = memories

    def take(self, layer: int, keys: Tensor, values: Tensor) -> Pair:
        """The memories of a memory layer, then the keys and values of this pass."""
        if self._memories is None or layer not in self._memories.parts:
            return keys, values
        of_keys, of_values = self._memories.parts[layer]
        return torch.cat([of_keys.to(keys.dtype), keys], 2), torch.cat([of_values.to(values.dtype), values], 2)

    def columns(self, before: int) -> Tensor:
        """The memories that the text sees. The sink sees none: it is the same whatever follows it."""
        seen = self.valid.new_zeros(*self.positions.shape, before)
        if before and self._memories is not None:
            seen[:, self.sink :] = self._memories.seen
        return seen


class _Layer(StoringLayer):  # type: ignore[no-untyped-call]  # an untyped __init_subclass__
    """Takes the keys and values of one layer."""

    def __init__(self, whole: Pass, layer: int) -> None:
        super().__init__()
        self._take: Callable[[int, Tensor, Tensor], Pair] = whole.take
        self._layer = layer

    def store(self, keys: Tensor, values: Tensor) -> Pair:
        """Keys and values that attention reads."""
        return self._take(self._layer, keys, values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of this pass alone: `Pass.mask` builds the masks."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Nothing came before."""
        return 0
