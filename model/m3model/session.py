"""`Session`: a batch of sequences that a model reads token by token, each with its own memories.

The session knows nothing of retrieval, sampling or text. It is where positions are decided: the sink at ``[0, s)``,
every memory in ``[s, s + 128)`` (parallel positions, Memory³ section 3.2), the context from its ``offset`` on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor

from m3model.arrangement import Arrangement
from m3model.attention import IMPLEMENTATION
from m3model.cache import MemoryCache
from m3model.layout import AttentionLayout

Sink = tuple[Tensor, Tensor]
"""Keys and values of the sink, each ``[layers, kv_heads, tokens, head_dim]``."""


def prepare(model: Any) -> None:
    """Let a transformers model read memories: set the attention implementation of `m3model.attention`."""
    model.set_attn_implementation(IMPLEMENTATION)


@dataclass(frozen=True, slots=True)
class Mark:
    """A place in a session."""

    columns: int
    lengths: Tensor


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
        arrange: Arrangement | None = None,
    ) -> None:
        """``offset`` is the position of the first context token; ``context`` how many tokens to allocate for at first.

        ``temperature`` divides the logits between queries and memories; ``arrange`` places those (default: as is).
        """
        self.model = model
        self.layout = AttentionLayout.of(model)
        self.cache = MemoryCache(self.layout, memory_layers, batch, context, temperature)
        if sink is not None:
            self.cache.put_sink(*sink)
        self.arrange = arrange
        self.offset = offset
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        """Tokens of context that each row has."""

    @torch.inference_mode()
    def read(
        self, memories: Sequence[Sequence[tuple[Tensor, Tensor]]], log_weights: Sequence[Sequence[float]] | None = None
    ) -> None:
        """Let each row attend to these memories from the next forward pass on; see `MemoryCache.put_memories`."""
        self.read_with_gradients(memories, log_weights)

    def read_with_gradients(
        self, memories: Sequence[Sequence[tuple[Tensor, Tensor]]], log_weights: Sequence[Sequence[float]] | None = None
    ) -> None:
        """As `read`, for memories that gradients are asked of. Only before the session's first forward pass."""
        arranged = memories if self.arrange is None else [self.arrange(row) for row in memories]
        self.cache.put_memories(arranged, log_weights)

    @overload
    def forward(
        self, tokens: Tensor, counts: Sequence[int] | None = None, *, logits: Literal[True] = True
    ) -> Tensor: ...

    @overload
    def forward(self, tokens: Tensor, counts: Sequence[int] | None = None, *, logits: Literal[False]) -> None: ...

    def forward(self, tokens: Tensor, counts: Sequence[int] | None = None, *, logits: bool = True) -> Tensor | None:
        """Read ``tokens`` (int64 ``[B, Q]``), of which row ``i`` has ``counts[i]`` (default all), padded on the right.

        Returns the logits after each row's last token, ``[B, vocabulary]`` (of no meaning in a row without any), or
        None if not asked for.
        """
        batch, length = tokens.shape
        last = (self._counted(tokens, counts) - 1).clamp_min(0)
        # A count, not indices, where there is one token: indexing would copy.
        keep = 1 if length == 1 else torch.unique(last) if logits else last[:1]
        kept = self._run(tokens, counts, keep=keep)
        if not logits:
            return None
        return kept[:, -1] if isinstance(keep, int) else kept[torch.arange(batch), torch.searchsorted(keep, last)]

    def mark(self) -> Mark:
        """Where the session is, to come back to by `rewind`."""
        return Mark(self.cache.columns, self.lengths.clone())

    def rewind(self, mark: "Mark") -> None:
        """Forget what was read since `mark`. Memories stay those that are read now."""
        self.cache.columns = mark.columns
        self.lengths = mark.lengths.clone()

    def all_logits(self, tokens: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """As `forward`, with the logits after every token, ``[B, Q, vocabulary]``, of no meaning after padding."""
        return self._run(tokens, counts, keep=0)

    def logits_with_gradients(self, tokens: Tensor, counts: Sequence[int] | None = None) -> Tensor:
        """As `all_logits`, and a gradient can be taken. The only forward pass of its session."""
        return self._pass(tokens, counts, keep=0)

    @torch.inference_mode()
    def _run(self, tokens: Tensor, counts: Sequence[int] | None, *, keep: int | Tensor) -> Tensor:
        return self._pass(tokens, counts, keep=keep)

    def _pass(self, tokens: Tensor, counts: Sequence[int] | None, *, keep: int | Tensor) -> Tensor:
        """One forward pass; the logits at the indices ``keep``, after the last so many tokens, or (0) after all."""
        device = self.layout.device
        counted = self._counted(tokens, counts)
        steps = torch.arange(tokens.shape[1])
        valid = steps < counted[:, None]
        # A padded query keeps the position of its row's next token; nothing ever sees its key.
        positions = self.offset + self.lengths[:, None] + torch.minimum(steps, counted[:, None].clamp_min(1) - 1)
        positions, valid = positions.to(device), valid.to(device)
        self.cache.begin(positions, valid)
        output = self.model(
            input_ids=tokens.to(device),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=keep.to(device) if isinstance(keep, Tensor) else keep,
            m3_cache=self.cache,
        )
        self.cache.commit()
        self.lengths += counted
        return output.logits  # type: ignore[no-any-return]

    def _counted(self, tokens: Tensor, counts: Sequence[int] | None) -> Tensor:
        batch, length = tokens.shape
        return torch.full((batch,), length) if counts is None else torch.tensor(counts)


@torch.inference_mode()
def make_sink(model: Any, tokens: Sequence[int]) -> Sink:
    """Keys and values of the constant prefix at positions ``[0, len(tokens))``."""
    session = Session(model, batch=1, context=len(tokens))
    session.forward(torch.tensor([list(tokens)]), logits=False)
    parts = [session.cache.context(layer) for layer in range(session.layout.layers)]
    return torch.stack([k[0] for k, _ in parts]), torch.stack([v[0] for _, v in parts])
