"""`RowBuffers`: the keys and values that the rows of an engine read, allocated once and overwritten in place.

Each layer's are ``[row, KV head, memories | sink | context, head dim]``. The memory region is filled from its right
end, so that what attention reads is one contiguous stretch of columns whatever the number of memories. A row's context
begins at the same column for all rows, and token ``i`` of it stands in column ``i``: what a query sees follows from its
place alone. One more row and one more column of context take what belongs to no sequence, so that a step writes as
much whoever takes part in it.
"""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from m3model.attention.budgets import Lacking
from m3model.attention.layout import AttentionLayout, LayerGroup, Pair
from m3model.attention.slots import Slot, distinct, place

GRAIN = 64
"""Memory and context are allocated by multiples of so many columns."""
_ALIGNED = 8
"""CUDA's kernels read masks whose rows begin at multiples of so many columns."""


def rounded(count: int, grain: int = GRAIN) -> int:
    """The next multiple of ``grain``."""
    return -(-count // grain) * grain


class Stack:
    """Buffers of layers that are alike, ``[layers, rows + 1, kv_heads, columns, head_dim]``.

    A memory is written to all layers by two strided copies: on a GPU two launches instead of dozens.
    """

    def __init__(self, group: LayerGroup) -> None:
        self.layers = group.layers
        self.group = group
        self.remembers = group.remembers
        """Are they memory layers? Others have no memory region."""
        self.keys = self.values = torch.empty(0)


class RowBuffers:
    """Keys, values and biases of all rows. Not thread-safe."""

    def __init__(
        self,
        layout: AttentionLayout,
        memory_layers: Sequence[int],
        sink: Pair | None,
        temperature: float = 1.0,
        log_weight: float = 0.0,
        budgets: Tensor | None = None,
    ) -> None:
        """``sink`` is ``[layers, kv_heads, tokens, head_dim]``.

        ``temperature`` divides the logits of memories, and ``log_weight`` is added to them. ``budgets`` are those of
        `Lacking`, where heads do not all have as many tokens of a memory.
        """
        self.layout = layout
        self.temperature = temperature
        self.log_weight = log_weight
        self.rows = self.region = self.context = 0
        """Rows, columns of memories and columns of context that are allocated."""
        grain = _ALIGNED if layout.device.type == "cuda" else 1
        self.sink = 0 if sink is None else rounded(sink[0].shape[2], grain)
        """Columns of the sink: the first ones are hidden if it has fewer tokens."""
        self._sink = sink
        self.stacks = [Stack(group) for group in layout.groups(memory_layers)]
        self.bias = torch.empty(0)
        """What is added to the logits of memories and sink, ``[rows, region + sink]``: zero, a log weight, or -inf."""
        self.lacking = None if budgets is None else Lacking(budgets)
        self._slots: list[dict[Hashable, Slot]] = []
        self._used: list[int] = []

    # -- room ---------------------------------------------------------------------------------------------------

    def bytes_of(self, rows: int, region: int, context: int) -> int:
        """Bytes of keys and values of so many rows, and of what hides them from heads."""
        numbers = 0 if self.lacking is None else self.lacking.heads * region
        for stack in self.stacks:
            columns = self.sink + context + 1 + (region if stack.remembers else 0)
            numbers += len(stack.layers) * columns * stack.group.shape.numbers
        return (rows + 1) * numbers * self.layout.dtype.itemsize

    @torch.inference_mode()
    def reserve(self, rows: int, region: int, context: int, *, room: int | None = None) -> bool:
        """Make room for so many rows, columns of memories and tokens of context; is everything in another place now?

        What was reserved earlier is kept beside it, unless that takes more than ``room`` bytes: then further rows and
        further context are given up. After an error nothing is reserved.
        """
        least = max(rows, 1), max(rounded(context), GRAIN)
        rows, region = max(rows, self.rows), max(rounded(region), self.region)
        context = max(rounded(context), self.context)
        if (rows, region, context) == (self.rows, self.region, self.context):
            return False
        if room is not None and self.bytes_of(rows, region, context) > room:
            rows, context = least
        try:
            self._resize(rows, region, context)
        except BaseException:
            self.drop()  # some are of the old size, some of the new
            raise
        return True

    def drop(self) -> None:
        """Drop all keys and values."""
        self.rows = self.region = self.context = 0
        self.bias = torch.empty(0)
        if self.lacking is not None:
            self.lacking.resize(0, 0, self.bias)
        for stack in self.stacks:
            stack.keys = stack.values = torch.empty(0)

    def _resize(self, rows: int, region: int, context: int) -> None:
        for stack in self.stacks:
            sink: Pair | tuple[None, None] = None, None
            if self._sink is not None:
                own = self._sink[0][stack.layers], self._sink[1][stack.layers]
                sink = self.layout.unpacked(own, stack.group.shape)
            sizes = rows, region, context
            # One after the other: the first old buffer is gone before the second new one comes.
            stack.keys = self._resized(stack, stack.keys, stack.group.shape.key_dim, sink[0], *sizes)
            stack.values = self._resized(stack, stack.values, stack.group.shape.value_dim, sink[1], *sizes)
        bias = torch.full(
            (rows + 1, region + self.sink), -torch.inf, dtype=self.layout.dtype, device=self.layout.device
        )
        kept = min(rows, self.rows)
        if kept:
            bias[:kept, region - self.region :] = self.bias[:kept]
        self.bias = bias
        if self.lacking is not None:
            self.lacking.resize(rows + 1, region, bias)
        self._slots += [{} for _ in range(rows + 1 - len(self._slots))]
        self._used += [0] * (rows + 1 - len(self._used))
        self.rows, self.region, self.context = rows, region, context

    def _resized(
        self, stack: Stack, old: Tensor, dim: int, sink: Tensor | None, rows: int, region: int, context: int
    ) -> Tensor:
        layout, before = self.layout, (region if stack.remembers else 0) + self.sink
        shape = (len(stack.layers), rows + 1, stack.group.shape.kv_heads, before + context + 1, dim)
        # Zeros, for a column that is masked must still be finite.
        new = torch.zeros(shape, dtype=layout.dtype, device=layout.device)
        if sink is not None:
            new[..., before - sink.shape[2] : before, :] = sink[:, None]
        if self.rows:
            kept, rows = (self.region if stack.remembers else 0) + self.sink, min(rows, self.rows)
            tokens = min(context, self.context)
            new[:, :rows, :, before - kept : before + tokens] = old[:, :rows, :, : kept + tokens]
        return new

    # -- rows ---------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def begin(self, row: int, *, sink: bool) -> None:
        """Give a row to a sequence: without memories, and with the sink if it reads any."""
        self._slots[row], self._used[row] = {}, 0
        self.bias[row] = -torch.inf
        if self.layout.dtype is torch.float16:  # whose keys overflow easily
            self.wipe(row)
        if sink and self._sink is not None:
            self.bias[row, self.region + self.sink - self._sink[0].shape[2] :] = 0

    @torch.inference_mode()
    def wipe(self, row: int) -> None:
        """Forget what a row has written: what is hidden still counts where it is no number. Its sink stays."""
        for stack in self.stacks:
            start = self.region if stack.remembers else 0
            for buffer in (stack.keys, stack.values):
                buffer[:, row, :, :start] = 0
                buffer[:, row, :, start + self.sink :] = 0

    @torch.inference_mode()
    def move(self, row: int, to: int, tokens: int) -> None:
        """Move a row with ``tokens`` tokens of context to another one, which is free."""
        for stack in self.stacks:
            for buffer in (stack.keys, stack.values):
                end = buffer.shape[3] - 1 - self.context + tokens
                buffer[:, to, :, :end] = buffer[:, row, :, :end]
                if self.layout.dtype is torch.float16:
                    buffer[:, to, :, end:] = 0
        self.bias[to] = self.bias[row]
        if self.lacking is not None:
            self.lacking.move(row, to)
        self._slots[to], self._used[to] = self._slots[row], self._used[row]
        self._slots[row], self._used[row] = {}, 0

    def used(self, rows: int) -> int:
        """Columns of memories that the first rows read."""
        return max(self._used[:rows], default=0)

    @torch.inference_mode()
    def put_memories(
        self, row: int, memories: Sequence[Pair], names: Sequence[Hashable], log_weights: Sequence[float]
    ) -> list[Slot]:
        """Let a row read these memories from now on, and none of the earlier ones.

        Memories are ``(keys, values)``, each ``[memory layers, kv_heads, tokens, head_dim]``; ``names`` says which they
        are: one that the row reads already under its name is not written again. ``log_weights`` are added to the logits
        of each memory's keys. There must be room for them, see `reserve`. Returns the place of each.
        """
        lengths = [keys.shape[2] for keys, _ in memories]
        used, named, held = sum(lengths), distinct(names), self._slots[row]
        slots = place(held, list(zip(named, lengths, strict=True)), used)
        bias = torch.full((self.region,), -torch.inf, dtype=self.layout.dtype)
        for name, memory, weight in zip(named, memories, log_weights, strict=True):
            slot = slots[name]
            bias[self.region - slot.end : self.region - slot.start] = weight + self.log_weight
            if held.get(name) != slot:
                self._write(row, slot, memory)
        self._slots[row], self._used[row] = slots, used
        self.bias[row, : self.region].copy_(bias, non_blocking=True)
        return [slots[name] for name in named]

    def _write(self, row: int, slot: Slot, memory: Pair) -> None:
        columns = slice(self.region - slot.end, self.region - slot.start)
        for stack in self.stacks:
            if stack.remembers:
                keys, values = self.layout.of_group(memory, stack.group)
                stack.keys[:, row, :, columns] = keys if self.temperature == 1.0 else keys / self.temperature
                stack.values[:, row, :, columns] = values
        if self.lacking is not None:
            self.lacking.write(row, columns)
