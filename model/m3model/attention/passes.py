"""Forward passes that gradients flow through: encoding references, and reading text with their memories.

Both run the model's own layers with the attention of `.implementation`, as a `Session` does. Where that writes into
buffers, these concatenate: nothing is overwritten that a backward pass asks for.

What a token sees follows from its place alone (`_rule`), so that fused kernels need no mask of a number for each query
and column: without memories attention is causal, and with them FlexAttention leaves out the blocks that nobody sees.
Padding stands on the right, where no other token sees it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Never

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from m3model.attention.flexible import BlockMask, Rule, added_mask, block_mask, can_flex, flexible
from m3model.attention.implementation import Weighing, Window, attend, attend_causally
from m3model.attention.layout import Pair
from m3model.attention.stopping import StoringLayer


@dataclass(frozen=True, slots=True)
class ReadMemories:
    """The memories that the text of a batch reads, of all its chunks, one after the other."""

    parts: dict[int, Pair]
    """Keys and values of each memory layer, ``[n, kv_heads, width, head_dim]``: those of all distinct references."""
    places: Tensor
    """Which of the n each chunk of each text reads, int64 ``[B, chunks]``."""
    tokens: Tensor
    """How many tokens that memory has, int64 ``[B, chunks]``, at most ``width``."""
    width: int
    chunk_tokens: int
    """Tokens of a chunk of the text."""
    chunks: int
    """Each token sees the memories of so many chunks: its own and those before it."""


Mask = Tensor | BlockMask | None
"""Numbers that are added to logits, or the blocks of FlexAttention; None where each token sees all before it."""


class Masks:
    """What hides columns in the layers of one pass. Layers of a kind share a mask."""

    def __init__(
        self, sink: int, positions: Tensor, valid: Tensor | None, memories: ReadMemories | None, *, flexes: bool
    ) -> None:
        """The arguments are those of `Pass`. ``flexes``: where not all is seen, FlexAttention computes."""
        self.sink = sink
        self._rows, self._length = positions.shape
        self._device = positions.device
        self._valid = None if valid is None else torch.nn.functional.pad(valid, (sink, 0), value=True)
        self._memories = memories
        self._flexes = flexes
        self._made: dict[tuple[int | None, bool, torch.dtype], Mask] = {}

    def of(self, window: int | None, *, reads: bool, dtype: torch.dtype) -> Mask:
        """The mask of layers with this window, that read memories or not, and compute in ``dtype``."""
        key = (window, reads, dtype)
        if key not in self._made:
            causal = not reads and self._valid is None and (window is None or window >= self._length)
            self._made[key] = None if causal else self._build(window, reads, dtype, flexes=self._flexes)
        return self._made[key]

    def added(self, window: int | None, *, reads: bool, dtype: torch.dtype) -> Tensor:
        """A mask as numbers that are added to the logits, ``[B or 1, 1, Q, K]``: zero or -inf."""
        mask = self._build(window, reads, dtype, flexes=False)
        assert isinstance(mask, Tensor)
        return mask

    def _build(self, window: int | None, reads: bool, dtype: torch.dtype, *, flexes: bool) -> Tensor | BlockMask:
        memories = self._memories if reads else None
        rule = _rule(self.sink, window, self._valid, memories)
        rows = 1 if memories is None and self._valid is None else self._rows
        columns = self._length + (0 if memories is None else memories.tokens.shape[1] * memories.width)
        if flexes:
            return block_mask(rule, rows, self._length, columns, self._device)
        return added_mask(rule, rows, self._length, columns, self._device, dtype)


def _rule(sink: int, window: int | None, valid: Tensor | None, memories: ReadMemories | None) -> Rule:
    """What a token of ``[sink | text]`` sees of ``[memories | sink | text]``.

    The sink is seen in layers with a sliding window as well, and memories too. It sees none itself: it is the same
    whatever follows it. The function that is returned closes over nothing but numbers and tensors, for it is compiled.
    """
    tokens = None if memories is None else memories.tokens
    width = chunk_tokens = chunks = 1
    if memories is not None:
        width, chunk_tokens, chunks = memories.width, memories.chunk_tokens, memories.chunks
    before = 0 if tokens is None else tokens.shape[1] * width

    def sees(row: Tensor, head: Tensor, query: Tensor, column: Tensor) -> Tensor:  # noqa: ARG001 - alike for all heads
        own = column - before
        seen = own <= query
        if window is not None:
            seen = seen & ((query - own < window) | (own < sink))
        if valid is not None:  # padding sees itself: a softmax over nothing is 0/0
            seen = seen & (valid[row, own.clamp(min=0)] | (own == query))
        if tokens is not None:
            chunk = (column // width).clamp(max=tokens.shape[1] - 1)
            age = (query - sink) // chunk_tokens - chunk
            reads = (query >= sink) & (age >= 0) & (age < chunks) & (column % width < tokens[row, chunk])
            seen = torch.where(own < 0, reads, seen)
        return seen

    return sees


class Pass(Cache):
    """One forward pass over ``[sink | text]``: what stands for a cache, in place of `MemoryCache`."""

    def __init__(
        self,
        layers: int,
        sink: int,
        positions: Tensor,
        *,
        valid: Tensor | None = None,
        memories: ReadMemories | None = None,
    ) -> None:
        """``positions`` is int64 ``[B, sink + T]``.

        ``valid`` is ``bool[B, T]``, which tokens of the text are no padding. None: padding, if there is any, stands on
        the right, and nobody looks at what it reads.
        """
        self.sink = sink
        self.positions = positions
        masks = Masks(sink, positions, valid, memories, flexes=can_flex(positions.device))
        parts = {} if memories is None else memories.parts
        places = None if memories is None else memories.places
        super().__init__(layers=[PassLayer(masks, parts.get(layer), places) for layer in range(layers)])

    def layer(self, index: int) -> "PassLayer":
        """One of the layers."""
        return self.layers[index]  # type: ignore[return-value]  # typed as any layer of the library


class EncodingPass(Pass):
    """References, each after the sink: keeps the keys and values of the memory layers, then raises `StoredError`."""

    def __init__(
        self, layers: int, sink: int, valid: Tensor, positions: Tensor, memory_layers: Sequence[int], *, scores: bool
    ) -> None:
        """``valid`` is ``bool[B, T]``: which tokens are no padding. ``scores``: are they scored, for a choice?"""
        super().__init__(layers, sink, positions)
        query_valid = torch.nn.functional.pad(valid, (sink, 0))
        for layer in memory_layers:
            self.layer(layer).keeps = True
            self.layer(layer).query_valid = query_valid if scores else None
        self.layer(max(memory_layers)).is_last = True

    def memories_of(self, layers: Sequence[int]) -> list[Pair]:
        """The keys and values of memory layers, after the pass."""
        return [self.layer(layer).kept or self._nothing(layer) for layer in layers]

    def scores_of(self, layer: int) -> Tensor:
        """The attention that each token of the references received, ``[B, kv_heads, T]``, after the pass."""
        scores = self.layer(layer).scores
        return (self._nothing(layer) if scores is None else scores)[:, :, self.sink :]

    def _nothing(self, layer: int) -> Never:
        raise RuntimeError(f"the model did not run layer {layer}")


class PassLayer(StoringLayer):
    """One layer of a pass. Its attention is given this in place of the whole: nothing here differs by number."""

    def __init__(self, masks: Masks, memory: Pair | None, places: Tensor | None) -> None:
        """``memory`` and ``places`` are those of `ReadMemories`, for this layer."""
        super().__init__()
        self._masks = masks
        self._memory = memory
        self._places = places
        self._mask: Mask = None
        self.keeps = False
        """Is this a memory layer of references?"""
        self.kept: Pair | None = None
        """Its keys and values without the sink's, after the pass."""
        self.query_valid: Tensor | None = None
        """The queries that are scored, ``bool[B, sink + T]``: neither the sink's nor padding. None: none are."""
        self.scores: Tensor | None = None
        """The attention that each token received, ``[B, kv_heads, sink + T]``, if it was scored."""

    def begin(self, window: int | None, hidden: Tensor) -> None:
        """Make the mask, before the layer runs."""
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        self._mask = self._masks.of(window, reads=self._memory is not None, dtype=dtype)

    def store(self, keys: Tensor, values: Tensor) -> Pair:
        """Keys and values that attention reads: the memories', then those of this pass."""
        keys = keys.to(values.dtype)  # which rotation has made float32, in mixed precision
        if self.keeps:
            self.kept = keys[:, :, self._masks.sink :], values[:, :, self._masks.sink :]
        if self._memory is None or self._places is None:
            return keys, values
        of_keys, of_values = self._memory
        return (
            torch.cat([_read(of_keys, self._places).to(keys.dtype), keys], 2),
            torch.cat([_read(of_values, self._places).to(values.dtype), values], 2),
        )

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, window: int | None, weighing: Weighing) -> Tensor:
        """See `m3model.attention.implementation.Attending`."""
        query = query.to(values.dtype)
        if not weighing.is_plain:
            mask = self._masks.added(window, reads=self._memory is not None, dtype=query.dtype)
            return attend(query, keys, values, mask, weighing)
        if self._mask is None:
            return attend_causally(query, keys, values, weighing)
        if isinstance(self._mask, Tensor):
            return attend(query, keys, values, self._mask.to(query.dtype), weighing)
        return flexible(query, keys, values, self._mask, weighing.scale)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of this pass alone: `Masks` builds the masks."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Nothing came before."""
        return 0


def _read(memories: Tensor, places: Tensor) -> Tensor:
    """``[n, kv_heads, K, D]`` as each text reads them, ``[B, kv_heads, chunks * K, D]``."""
    found = memories.index_select(0, places.flatten())  # its gradient is one kernel, that of an index is a sort
    return found.view(*places.shape, *memories.shape[1:]).transpose(1, 2).flatten(2, 3)


def hand_out(model: Any) -> None:
    """Let each layer of a model be given its own `PassLayer`, from now on, where the model is given a `Pass`."""
    for index, layer in enumerate(model.get_decoder().layers):
        layer.register_forward_pre_hook(partial(_own, index), with_kwargs=True)


def _own(index: int, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    whole, window = kwargs.get("m3_cache"), kwargs.get("attention_mask")
    if not isinstance(whole, Pass) or not isinstance(window, Window):
        return None
    own = whole.layer(index)
    own.begin(window.tokens, args[0] if args else kwargs["hidden_states"])
    return args, {**kwargs, "m3_cache": own}
