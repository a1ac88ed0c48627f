"""`MemoryCache`: one preallocated buffer per layer, laid out ``[memories | sink | context]``.

The memory region is filled from its right end, so that what attention reads, ``[used memories | sink | context so
far]``, is one contiguous stretch of columns whatever the number of memories: a decode step copies nothing but its own
token. Columns need not be in the order of positions, for RoPE is in the keys already. Layers without memories have no
memory region.

All rows of a batch share columns and differ in what is valid there: prompts are padded on the right, and a padded
column is never seen.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from m3model.layout import AttentionLayout


class MemoryCache(Cache):
    """Keys and values of a batch of sequences, with the memories each of them holds now. Not thread-safe."""

    def __init__(
        self, layout: AttentionLayout, memory_layers: Sequence[int], batch: int, context: int, temperature: float = 1.0
    ) -> None:
        """``context`` is how many columns are allocated at first; the buffers grow when they must.

        ``temperature`` divides the logits between queries and the keys of memories.
        """
        self.layout = layout
        self.temperature = temperature
        self.memory_layers = tuple(memory_layers)
        self.batch = batch
        self.columns = 0
        """Columns of context that are filled."""
        self.sink_tokens = 0
        self.used = 0
        """Columns of the memory region that are filled."""
        self.region = 0
        """Columns of the memory region."""
        self._context = context
        self._memory_bias = torch.zeros(batch, 0, dtype=layout.dtype, device=layout.device)
        self._biased = False  # whether some row does not see all of the region as it is
        self._weighted = False  # whether some memory is seen, but less than wholly
        self._pending = 0  # columns of the forward pass under way
        self._positions = torch.zeros(batch, context, dtype=torch.int64, device=layout.device)
        self._valid = torch.zeros(batch, context, dtype=torch.bool, device=layout.device)
        self._whole = True  # no padding anywhere: then nothing but causality hides context
        self._query_positions = torch.zeros(batch, 0, dtype=torch.int64, device=layout.device)
        self._query_valid = torch.zeros(batch, 0, dtype=torch.bool, device=layout.device)
        self._masks: dict[tuple[int, int | None], Tensor | None] = {}
        has_memory = set(memory_layers)
        super().__init__(layers=[MemoryCacheLayer(self, i in has_memory) for i in range(layout.layers)])

    # -- what stands before the context -------------------------------------------------------------------------

    def put_sink(self, keys: Tensor, values: Tensor) -> None:
        """Place the sink, ``[layers, kv_heads, tokens, head_dim]``, before the context of every row."""
        if self.columns or self.used:
            raise RuntimeError("the sink goes in before anything else")
        self.sink_tokens = keys.shape[2]
        for layer in self._layers:
            layer.allocate(0, self.sink_tokens + self._context)
        for index, layer in enumerate(self._layers):
            layer.keys[:, :, : self.sink_tokens] = keys[index]
            layer.values[:, :, : self.sink_tokens] = values[index]

    def put_memories(
        self, memories: Sequence[Sequence[tuple[Tensor, Tensor]]], log_weights: Sequence[Sequence[float]] | None = None
    ) -> None:
        """Let each row read these memories from now on, and none of the earlier ones.

        ``memories[row]`` lists ``(keys, values)``, each ``[memory layers, kv_heads, tokens, head_dim]``;
        ``log_weights[row]`` what is added to the logits of each memory's keys (default: nothing).
        """
        weights = [[0.0] * len(row) for row in memories] if log_weights is None else log_weights
        if len(memories) != self.batch or any(len(w) != len(m) for w, m in zip(weights, memories, strict=True)):
            raise ValueError(f"memories or weights do not fit a batch of {self.batch}")
        lengths = [sum(keys.shape[2] for keys, _ in row) for row in memories]
        self.used = max(lengths)
        if self.used > self.region:
            self._grow_region(self.used)
        bias = torch.full((self.batch, self.used), -torch.inf, dtype=self.layout.dtype)
        for row, (parts, length) in enumerate(zip(memories, lengths, strict=True)):
            column = self.region - length
            for (keys, values), weight in zip(parts, weights[row], strict=True):
                end = column + keys.shape[2]
                shift = self.used - self.region
                bias[row, column + shift : end + shift] = weight
                keys = keys if self.temperature == 1.0 else keys / self.temperature
                for index, layer in enumerate(self.memory_layers):
                    self._layers[layer].keys[row, :, column:end] = keys[index]
                    self._layers[layer].values[row, :, column:end] = values[index]
                column = end
        self._biased = bool((bias != 0).any())
        self._weighted = any(weight != 0 for row in weights for weight in row)
        self._memory_bias = bias.to(self.layout.device)
        self._masks.clear()

    # -- one forward pass ---------------------------------------------------------------------------------------

    def begin(self, positions: Tensor, valid: Tensor) -> None:
        """Announce the next forward pass: ``positions`` int64 and ``valid`` bool, both ``[B, Q]``."""
        length = positions.shape[1]
        if self.columns + length > self._context:
            self._grow_context(max(self.columns + length, self._context * 2))
        self._positions[:, self.columns : self.columns + length] = positions
        self._valid[:, self.columns : self.columns + length] = valid
        self._whole = self._whole and bool(valid.all())
        self._query_positions, self._query_valid = positions, valid
        self._pending = length
        self._masks.clear()

    def commit(self) -> None:
        """End the forward pass: its columns belong to the context now."""
        self.columns += self._pending
        self._pending = 0

    @property
    def query_valid(self) -> Tensor:
        """Which queries of the forward pass under way are no padding, ``bool[B, Q]``."""
        return self._query_valid

    def mask(self, queries: int, keys: int, window: int | None) -> Tensor | None:
        """What attention adds to the logits of the last ``keys`` columns, ``[B, 1, Q, K]``; None if nothing.

        Boolean (true: seen) unless memories are weighted. Memories and sink are seen in layers with a sliding window as
        well: they stand outside the sequence.
        """
        if (keys, window) not in self._masks:
            self._masks[keys, window] = self._build_mask(queries, keys, window)
        return self._masks[keys, window]

    def _build_mask(self, queries: int, keys: int, window: int | None) -> Tensor | None:
        context = self.columns + self._pending
        memory = keys - self.sink_tokens - context
        hidden = (memory and self._biased) or not self._whole
        if queries == 1 and not hidden and (window is None or context <= window):
            return None
        asked = self._query_positions[:, :, None]
        there = self._positions[:, None, :context]
        seen = self._valid[:, None, :context] & (there <= asked)
        if window is not None:
            seen &= asked - there < window
        # A padded query must see something, or its softmax is 0/0: let it see its own column.
        own = torch.arange(queries, device=seen.device)
        seen[:, own, self.columns + own] |= ~self._query_valid
        bias = self._memory_bias[:, None, self.used - memory :].expand(-1, queries, -1)
        if not memory or not self._weighted:
            parts = [bias == 0, seen.new_ones(self.batch, queries, self.sink_tokens), seen]
        else:
            zeros = bias.new_zeros(self.batch, queries, self.sink_tokens)
            parts = [bias, zeros, torch.zeros_like(seen, dtype=bias.dtype).masked_fill(~seen, -torch.inf)]
        return torch.cat(parts, dim=2)[:, None]

    # -- growth -------------------------------------------------------------------------------------------------

    @property
    def _layers(self) -> "list[MemoryCacheLayer]":
        return self.layers  # type: ignore[return-value]  # typed as their base class

    def _grow_region(self, columns: int) -> None:
        for index in self.memory_layers:
            self._layers[index].move(columns - self.region, 0)
        self.region = columns

    def _grow_context(self, columns: int) -> None:
        extra = columns - self._context
        for layer in self._layers:
            layer.move(0, extra)
        self._positions = torch.nn.functional.pad(self._positions, (0, extra))
        self._valid = torch.nn.functional.pad(self._valid, (0, extra))
        self._context = columns

    def context(self, layer: int) -> tuple[Tensor, Tensor]:
        """Views of the context's keys and values of a layer, ``[B, kv_heads, columns, head_dim]``."""
        at = self._layers[layer]
        start = at.region + self.sink_tokens
        return at.keys[:, :, start : start + self.columns], at.values[:, :, start : start + self.columns]


class MemoryCacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # its __init_subclass__ is untyped
    """One layer's buffers, ``[B, kv_heads, region + sink + context, head_dim]``."""

    keys: Tensor
    values: Tensor

    def __init__(self, cache: MemoryCache, has_memory: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.cache = cache
        self.has_memory = has_memory
        self.allocate(0, cache._context)

    @property
    def region(self) -> int:
        """Columns of the memory region of this layer."""
        return self.cache.region if self.has_memory else 0

    def allocate(self, before: int, columns: int) -> None:
        """Fresh buffers of that many columns, zeroed: a column that is masked must still be finite."""
        layout = self.cache.layout
        shape = (self.cache.batch, layout.kv_heads, before + columns, layout.head_dim)
        self.keys = torch.zeros(shape, dtype=layout.dtype, device=layout.device)
        self.values = torch.zeros(shape, dtype=layout.dtype, device=layout.device)
        self.is_initialized = True

    def move(self, before: int, after: int) -> None:
        """Add columns on either side of what is there."""
        self.keys = torch.nn.functional.pad(self.keys, (0, 0, before, after))
        self.values = torch.nn.functional.pad(self.values, (0, 0, before, after))

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the new columns, and return all that this layer's attention reads."""
        start = self.region + self.cache.sink_tokens + self.cache.columns
        end = start + key_states.shape[2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        first = self.region - self.cache.used if self.has_memory else 0
        return self.keys[:, :, first:end], self.values[:, :, first:end]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do: the buffers are there from the start."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that attention reads, and their offset."""
        used = self.cache.used if self.has_memory else 0
        return used + self.cache.sink_tokens + self.cache.columns + query_length, 0

    def get_seq_length(self) -> int:
        """Columns of context so far."""
        return self.cache.columns

    def get_max_length(self) -> int:
        """No bound: the buffers grow."""
        return -1
