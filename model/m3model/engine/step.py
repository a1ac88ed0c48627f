"""One step of the engine: rows that decode read a token each, others a part of their prompts, in one forward pass.

The tokens of all rows stand in one sequence of the model, ``[decoding rows | parts of prompts]``: projections and the
rest of each layer know no rows, and attention takes them apart again. A step reads nothing but buffers that were there
before it, at shapes that `Shape` alone decides: no host synchronisation, no data-dependent Python, no tensor that
outlives it. So it can be captured as a CUDA graph, see `m3model.engine.graph`.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from m3model.attention.budgets import with_added
from m3model.attention.implementation import Weighing, attend, attention_weights
from m3model.attention.layout import Pair
from m3model.attention.stopping import StoringLayer
from m3model.attention.versions import cache_name
from m3model.engine.buffers import RowBuffers
from m3model.engine.sampling import Chosen, Kinds, Sampling


@dataclass(frozen=True, slots=True)
class Shape:
    """All that decides which operations a step is made of."""

    decoding: int
    """The first so many rows read one token each, whether they decode or not."""
    parts: int
    """Parts of prompts."""
    width: int
    """Tokens of each part, with padding."""
    ends: int
    """Parts that a token is drawn after. The head, much of a small model, is asked for no others."""
    memories: int
    """Columns of memories that attention reads."""
    context: int
    """Columns of context that attention reads."""
    kinds: Kinds
    threads: int = 1
    """How many compute it on a CPU."""

    @property
    def tokens(self) -> int:
        """Tokens of the forward pass."""
        return self.decoding + self.parts * self.width

    @property
    def results(self) -> int:
        """Tokens that are drawn."""
        return self.decoding + self.ends


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the host says about a step: views of one buffer on the device, of the step's shape."""

    prompts: Tensor
    """The tokens of the parts of prompts, ``[parts * width]``; int64, as all but ``uniform``."""
    positions: Tensor
    """The position of each token."""
    rows: Tensor
    """The row that each token's key and value are written to,"""
    columns: Tensor
    """and the column of context there."""
    sees: Tensor
    """The last column of context that each token sees."""
    part_rows: Tensor
    """The row of each part."""
    results: Tensor
    """The places of the tokens whose logits are wanted,"""
    result_rows: Tensor
    """and the rows that are sampled by them."""
    uniform: Tensor
    """Numbers to draw tokens by, float32; see `m3model.engine.sampling.uniforms`."""


@dataclass(frozen=True, slots=True)
class Places:
    """What a step writes and reads of one layer's buffers."""

    vectors: Pair
    """All keys and all values, ``[vectors, head_dim]``."""
    written: Tensor
    """The places among them of each token's heads, int64 ``[T * kv_heads]``."""
    read: Pair
    """The columns that attention reads, ``[rows, kv_heads, K, head_dim]``.

    The rows are those that decode where no prompt is read, else all.
    """

    def write(self, keys: Tensor, values: Tensor) -> None:
        """Write the tokens' keys and values, ``[1, kv_heads, T, head_dim]``."""
        for vectors, new in zip(self.vectors, (keys, values), strict=True):
            if new.dtype is not vectors.dtype:
                new = new.to(vectors.dtype)
            # Not by rows and columns: that takes a CPU twice as long.
            vectors.index_copy_(0, self.written, new.transpose(1, 2).reshape(-1, vectors.shape[1]))


class _Layer(StoringLayer):
    """One layer of a `StepCache`."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places = places

    def store(self, keys: Tensor, values: Tensor) -> Pair:
        """Write the tokens' keys and values to their places; return what attention reads."""
        self.places.write(keys, values)
        return self.places.read

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Of no meaning: masks are the cache's."""
        return query_length, 0

    def get_seq_length(self) -> int:
        """Of no meaning: each row has its own."""
        return 0


class StepCache(Cache):
    """What stands for a cache in the forward pass of a step. It holds nothing but the step's own."""

    def __init__(self, buffers: RowBuffers, shape: Shape, inputs: Inputs) -> None:
        self.buffers = buffers
        self.shape = shape
        self.inputs = inputs
        self._masks: dict[tuple[int, int | None], tuple[Tensor, Tensor]] = {}
        self._shares: list[Tensor] = []
        self._read = 0  # attentions of this pass that read memories
        self._telling = telling(sum(len(stack.layers) for stack in buffers.stacks if stack.remembers))
        self.places = self._all_places()
        """Of each layer."""
        super().__init__(layers=list(map(_Layer, self.places)))

    def _all_places(self) -> list[Places]:
        buffers, shape, inputs = self.buffers, self.shape, self.inputs
        rows = buffers.rows + 1 if shape.parts else shape.decoding
        found: dict[int, Places] = {}
        for stack in buffers.stacks:
            _, _, heads, columns, _ = stack.keys.shape
            first = buffers.sink + (buffers.region if stack.remembers else 0)  # column of context
            own = torch.arange(heads, device=inputs.rows.device) * columns + first
            written = ((inputs.rows * (heads * columns) + inputs.columns)[:, None] + own).flatten()
            before = buffers.sink + (shape.memories if stack.remembers else 0)
            pairs = []
            # For all layers at once: to take a view takes Python as long as a small kernel.
            for buffer in (stack.keys, stack.values):
                read = buffer.narrow(1, 0, rows).narrow(3, first - before, before + shape.context)
                pairs.append(zip(buffer.flatten(1, 3).unbind(), read.unbind(), strict=True))
            for layer, (keys, read_keys), (values, read_values) in zip(stack.layers, *pairs, strict=True):
                found[layer] = Places((keys, values), written, (read_keys, read_values))
        return [found[layer] for layer in range(buffers.layout.layers)]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, window: int | None, weighing: Weighing) -> Tensor:
        """Attention of each row's tokens over its own columns; see `m3model.attention.implementation.Attending`."""
        shape, threads = self.shape, self.shape.threads
        memories = keys.shape[2] - self.buffers.sink - shape.context
        masks = self._mask(memories, window, query.dtype)
        if memories:
            masks = self._of_heads(masks, memories)
            if shape.kinds.grounding and self._read in self._telling:
                self._shares.append(self._share(query, keys, masks, weighing)[..., :memories])
            self._read += 1
        outputs = []
        if shape.decoding:
            # [1, Hq, R, D] -> [R, Hq, 1, D]
            asking, ours = query, (keys, values)
            if shape.parts:
                asking = query.narrow(2, 0, shape.decoding)
                ours = keys.narrow(0, 0, shape.decoding), values.narrow(0, 0, shape.decoding)
            outputs.append(attend(asking.transpose(0, 2), *ours, masks[0], weighing, threads=threads).transpose(0, 2))
        if shape.parts:
            heads, dim = query.shape[1], query.shape[3]
            # [1, Hq, P * Q, D] -> [P, Hq, Q, D]
            asking = query[0, :, shape.decoding :].reshape(heads, shape.parts, shape.width, dim).transpose(0, 1)
            # A copy: a part of a prompt reads its row once, where a decoding row reads it for each token.
            theirs = keys.index_select(0, self.inputs.part_rows), values.index_select(0, self.inputs.part_rows)
            read = attend(asking, *theirs, masks[1], weighing, threads=threads)
            outputs.append(read.transpose(0, 1).reshape(1, heads, -1, values.shape[3]))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 2)

    def shares(self) -> Tensor | None:
        """The share of attention of each result's query that each column of memories got: float32 ``[n, memories]``.

        The mean over heads and the layers of `telling`. None if there are no memories to read.
        """
        return torch.stack(self._shares).mean(0) if self._shares else None

    def _share(self, query: Tensor, keys: Tensor, masks: tuple[Tensor, Tensor], weighing: Weighing) -> Tensor:
        """The weights of a layer at the tokens whose logits are wanted, the mean over heads: float32 ``[n, K]``."""
        decoding, inputs = self.shape.decoding, self.inputs
        found = []
        if decoding:
            asking = query[:, :, :decoding].transpose(0, 2)  # [R, Hq, 1, D]
            found.append(attention_weights(asking, keys.narrow(0, 0, decoding), masks[0], weighing))
        if self.shape.ends:
            places = inputs.results[decoding:]
            asking = query.index_select(2, places).transpose(0, 2)  # [E, Hq, 1, D]
            # [P, 1 or Hkv, Q, K] -> [E, 1 or Hkv, 1, K]
            mask = masks[1].transpose(1, 2).flatten(0, 1).index_select(0, places - decoding)[:, :, None]
            theirs = keys.index_select(0, inputs.result_rows[decoding:])
            found.append(attention_weights(asking, theirs, mask, weighing))
        return torch.cat(found).mean((1, 2))

    def _of_heads(self, masks: tuple[Tensor, Tensor], memories: int) -> tuple[Tensor, Tensor]:
        """The masks of the memory layer whose attention is next, where KV heads have budgets of their own.

        Of decoding rows ``[R, kv_heads, 1, K]`` and of parts ``[P, kv_heads, Q, K]``. Memory layers run in their order.
        """
        if self.buffers.lacking is None:
            return masks
        added = self.buffers.lacking.added[self._read]
        added = added.narrow(2, added.shape[2] - memories, memories)
        decoding, parts = masks
        if self.shape.decoding:
            decoding = with_added(decoding, added.narrow(0, 0, self.shape.decoding))
        if self.shape.parts:
            parts = with_added(parts, added.index_select(0, self.inputs.part_rows))
        return decoding, parts

    def _mask(self, memories: int, window: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """What is added to the logits, of decoding rows ``[R, 1, 1, K]`` and of parts ``[P, 1, Q, K]``.

        Memories and sink are seen in layers with a sliding window as well: they stand outside the sequence.
        """
        if window is not None and self.shape.context <= window:
            window = None
        if (memories, window) not in self._masks:
            shape, bias = self.shape, self.buffers.bias
            bias = bias.narrow(1, bias.shape[1] - self.buffers.sink - memories, memories + self.buffers.sink)
            columns = torch.arange(shape.context, device=bias.device)
            sees = self.inputs.sees[:, None]
            seen = columns <= sees if window is None else (columns <= sees) & (columns > sees - window)
            context = torch.zeros((), dtype=bias.dtype, device=bias.device).where(seen, -torch.inf)
            decoding = torch.cat([bias[: shape.decoding], context[: shape.decoding]], 1)[:, None, None]
            parts = context[shape.decoding :].view(shape.parts, shape.width, shape.context)
            before = bias.index_select(0, self.inputs.part_rows)[:, None].expand(-1, shape.width, -1)
            self._masks[memories, window] = decoding.to(dtype), torch.cat([before, parts], 2)[:, None].to(dtype)
        return self._masks[memories, window]


def telling(memory_layers: int) -> frozenset[int]:
    """Places among the memory layers of those that tell what was read: up to four of the third quarter.

    Attention to the memory with the answer stands out there, in SmolLM2 more than in earlier and later layers, and to
    look at all layers would cost a CPU 7 % of a step, not 1 %.
    """
    return frozenset(memory_layers // 2 + memory_layers // 4 * place // 4 for place in range(4))


class Step:
    """The step of one model over its buffers."""

    def __init__(self, model: Any, buffers: RowBuffers, sampling: Sampling) -> None:
        self.model = model
        self.buffers = buffers
        self.sampling = sampling
        self.last = torch.zeros(1, dtype=torch.int64, device=buffers.layout.device)
        """The token that each row drew last, int64 ``[rows + 1]``: nobody has to tell the next step."""
        self._cache_name = cache_name(model)

    def reserve(self, rows: int) -> bool:
        """Make room for so many rows; is it in another place now?"""
        if len(self.last) > rows:
            return False
        self.last = torch.cat([self.last[:-1], self.last.new_zeros(rows + 2 - len(self.last))])
        return True

    def move(self, row: int, to: int) -> None:
        """Move a row to another one."""
        self.last[to] = self.last[row]

    def __call__(self, shape: Shape, inputs: Inputs) -> Chosen | None:
        """Read and draw; None if nothing is drawn. Rows of the results that belong to nobody have no meaning."""
        cache = StepCache(self.buffers, shape, inputs)
        output = self.model(
            input_ids=torch.cat([self.last[: shape.decoding], inputs.prompts])[None],
            position_ids=inputs.positions[None],
            use_cache=True,
            logits_to_keep=inputs.results,
            m3_cache=cache,
            **{self._cache_name: cache},
        )
        if not shape.results:
            return None
        chosen = self.sampling.choose(output.logits[0], inputs.result_rows, inputs.uniform, shape.kinds)
        self.last.index_copy_(0, inputs.result_rows, chosen.tokens.clamp_min(0))  # `NO_TOKEN` is none to read
        return replace(chosen, shares=cache.shares()) if shape.kinds.grounding else chosen
