"""`Session`: a batch of sequences that a model reads token by token, each with its own memories.

The session knows nothing of retrieval, sampling or text. It is where positions are decided: the sink at ``[0, s)``,
every memory in ``[s, s + 128)`` (parallel positions, Memory³ section 3.2), the context from its ``offset`` on.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from m3model.attention.arrangement import Arrangement
from m3model.attention.cache import MemoryCache
from m3model.attention.layout import AttentionLayout
from m3model.attention.rope import check_positions
from m3model.attention.versions import cache_name

Sink = tuple[Tensor, Tensor]
"""Keys and values of the sink, each ``[layers, kv_heads, tokens, head_dim]``."""

RowMemories = Sequence[Sequence[tuple[Tensor, Tensor]]]
"""The memories of each row: keys and values, each ``[memory layers, kv_heads, tokens, head_dim]``."""


class Session:
    """One batch in flight. Not thread-safe; several sessions of one model are independent."""

    def __init__(
        self,
        model: Any,
        *,
        batch: int,
        memory_layers: Sequence[int] = (),
        sink: Sink | None = None,
        offset: int = 0,
        context: int = 256,
        temperature: float = 1.0,
        log_weight: float = 0.0,
        arrange: Arrangement | None = None,
        budgets: Tensor | None = None,
    ) -> None:
        """``offset`` is the position of the first context token; ``context`` how many tokens to allocate for at first.

        ``temperature`` divides the logits between queries and memories, ``log_weight`` is added to them,
        ``arrange`` places memories (default: as they are), and ``budgets`` are those of `MemoryCache`.
        Raises `InputError` if the context would need more positions than the model's RoPE keeps fixed.
        """
        self.model = model
        self.layout = AttentionLayout.of(model)
        self._offset = offset
        check_positions(offset + context, self.layout.positions)
        self.cache = MemoryCache(self.layout, memory_layers, batch, context, temperature, log_weight, budgets)
        if sink is not None:
            self.cache.put_sink(*sink)
        self._cache_name = cache_name(model)
        self.arrange = arrange
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        """The number of tokens of context of each row, ``int64[B]`` on the CPU."""
        # The same on the device, as the position of each row's next token: a decode step copies nothing there.
        self._next = torch.full((batch,), offset, device=self.layout.device)
        self._read: RowMemories = ()

    @torch.inference_mode()
    def read(
        self,
        memories: RowMemories,
        log_weights: Sequence[Sequence[float]] | None = None,
        ids: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Let each row attend to these memories from the next forward pass on; see `MemoryCache.put_memories`.

        A memory that the row reads already is not written again. It is known by its id, or, where no ``ids`` are given,
        by being the same tensors.
        """
        self._place(memories, log_weights, ids)

    def read_with_gradients(self, memories: RowMemories) -> None:
        """`read` for memories that need gradients. Only before the session's only forward pass."""
        self._place(memories, None, None)
        self.cache.separate()

    def _place(
        self,
        memories: RowMemories,
        log_weights: Sequence[Sequence[float]] | None,
        ids: Sequence[Sequence[int]] | None,
    ) -> None:
        names: list[list[Hashable]] = (
            [[("part", id(keys)) for keys, _ in row] for row in memories] if ids is None else [list(row) for row in ids]
        )
        arranged = memories
        if self.arrange is not None:
            arranged = [self.arrange(row) for row in memories]
            names = [list(enumerate(row)) for row in names]  # how one is arranged depends on its place
        self.cache.put_memories(arranged, names, log_weights)
        self._read = memories  # so that tensors with the same `id` are the same

    def feed(self, tokens: Tensor, counts: Sequence[int] | None = None) -> None:
        """Read ``tokens``, int64 ``[B, Q]``, padded on the right; row ``i`` has ``counts[i]`` (default: all)."""
        self._run(tokens, counts, keep=torch.zeros(0, dtype=torch.int64))  # the head is much of a small model

    def forward(self, tokens: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """`feed`, and return the logits after each row's last token, ``[B, vocabulary]``.

        Those of a row without tokens have no meaning.
        """
        batch, length = tokens.shape
        if length == 1 or counts is None or min(counts) == length:
            # A count, not indices: indexing would copy.
            return self._run(tokens, counts, keep=1)[:, -1]
        last = torch.tensor(counts) - 1
        keep = torch.unique(last[last >= 0])
        kept = self._run(tokens, counts, keep=keep)
        places = torch.searchsorted(keep, last.clamp_min(0)).to(kept.device, non_blocking=True)
        return kept[torch.arange(batch, device=kept.device), places]

    def all_logits(self, tokens: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """`forward` with the logits after every token, ``[B, Q, vocabulary]``, of no meaning after padding."""
        return self._run(tokens, counts, keep=0)

    def logits_with_gradients(self, tokens: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """`all_logits` with gradients. The only forward pass of its session."""
        return self._pass(tokens, counts, keep=0)

    @torch.inference_mode()
    def _run(self, tokens: Tensor, counts: Sequence[int] | None, *, keep: int | Tensor) -> Tensor:
        return self._pass(tokens, counts, keep=keep)

    def _pass(self, tokens: Tensor, counts: Sequence[int] | None, *, keep: int | Tensor) -> Tensor:
        """One forward pass; the logits at the indices ``keep``, after the last so many tokens, or (0) after all."""
        device, length = self.layout.device, tokens.shape[1]
        if self.layout.positions is not None:
            check_positions(self._offset + int(self.lengths.max()) + length, self.layout.positions)
        counted = None if counts is None or min(counts) == length else torch.tensor(counts)
        positions = self._next[:, None]
        if length > 1:
            positions = positions + torch.arange(length, device=device)
        if counted is None:
            read: int | Tensor = length
            places = positions
        else:
            read = counted.to(device, non_blocking=True)
            # A padded query has the position of its row's last token: models may look for the highest one.
            places = torch.minimum(positions, (self._next + (read - 1).clamp_min(0))[:, None])
        if self.layout.shares and isinstance(keep, int):  # Gemma 4 would leave queries out of its last layers
            keep = torch.arange(length)[-keep:]
        self.cache.begin(positions, counted)
        output = self.model(
            input_ids=tokens.to(device, non_blocking=True),
            position_ids=places,
            use_cache=True,
            logits_to_keep=keep.to(device, non_blocking=True) if isinstance(keep, Tensor) else keep,
            m3_cache=self.cache,
            **{self._cache_name: self.cache},
        )
        self.cache.commit()
        self.lengths = self.lengths + (length if counted is None else counted)
        self._next = self._next + read
        return output.logits  # type: ignore[no-any-return]


@torch.inference_mode()
def make_sink(model: Any, tokens: Sequence[int]) -> Sink:
    """Keys and values of the constant prefix at positions ``[0, len(tokens))``."""
    session = Session(model, batch=1, context=len(tokens))
    session.feed(torch.tensor([list(tokens)]))
    layout = session.layout
    parts = [layout.packed(session.cache.context(layer)) for layer in range(layout.layers)]
    return torch.stack([k[0] for k, _ in parts]), torch.stack([v[0] for _, v in parts])
