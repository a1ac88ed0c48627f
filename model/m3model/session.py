"""`Session`: a batch of sequences that a model reads token by token, each with its own memories.

The session knows nothing of retrieval, sampling or text. It is where positions are decided: the sink at ``[0, s)``,
every memory in ``[s, s + 128)`` (parallel positions, Memory³ section 3.2), the context from its ``offset`` on.
"""

from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

from m3model.attention import IMPLEMENTATION
from m3model.cache import MemoryCache
from m3model.layout import AttentionLayout

Sink = tuple[Tensor, Tensor]
"""Keys and values of the sink, each ``[layers, kv_heads, tokens, head_dim]``."""


def prepare(model: Any) -> None:
    """Let a transformers model read memories: set the attention implementation of `m3model.attention`."""
    model.set_attn_implementation(IMPLEMENTATION)


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
    ) -> None:
        """``offset`` is the position of the first context token; ``context`` how many tokens to allocate for at first.

        ``temperature`` divides the logits between queries and memories.
        """
        self.model = model
        self.layout = AttentionLayout.of(model)
        self.cache = MemoryCache(self.layout, memory_layers, batch, context, temperature)
        if sink is not None:
            self.cache.put_sink(*sink)
        self.offset = offset
        self.lengths = torch.zeros(batch, dtype=torch.int64)
        """Tokens of context that each row has."""

    @torch.inference_mode()
    def read(
        self, memories: Sequence[Sequence[tuple[Tensor, Tensor]]], log_weights: Sequence[Sequence[float]] | None = None
    ) -> None:
        """Let each row attend to these memories from the next forward pass on; see `MemoryCache.put_memories`."""
        self.cache.put_memories(memories, log_weights)

    @overload
    def forward(
        self, tokens: Tensor, counts: Sequence[int] | None = None, *, logits: Literal[True] = True
    ) -> Tensor: ...

    @overload
    def forward(self, tokens: Tensor, counts: Sequence[int] | None = None, *, logits: Literal[False]) -> None: ...

    @torch.inference_mode()
    def forward(self, tokens: Tensor, counts: Sequence[int] | None = None, *, logits: bool = True) -> Tensor | None:
        """Read ``tokens`` (int64 ``[B, Q]``), of which row ``i`` has ``counts[i]`` (default all), padded on the right.

        Returns the logits after each row's last token, ``[B, vocabulary]`` (of no meaning in a row without any), or
        None if not asked for.
        """
        batch, length = tokens.shape
        device = self.layout.device
        counted = torch.full((batch,), length) if counts is None else torch.tensor(counts)
        steps = torch.arange(length)
        valid = steps < counted[:, None]
        # A padded query keeps the position of its row's next token; nothing ever sees its key.
        positions = self.offset + self.lengths[:, None] + torch.minimum(steps, counted[:, None].clamp_min(1) - 1)
        positions, valid = positions.to(device), valid.to(device)
        last = (counted - 1).clamp_min(0)
        keep: int | Tensor = 1
        if length > 1:
            keep = torch.unique(last) if logits else last[:1]
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
        if not logits:
            return None
        if isinstance(keep, int):
            return output.logits[:, -1]  # type: ignore[no-any-return]
        return output.logits[torch.arange(batch), torch.searchsorted(keep, last)]  # type: ignore[no-any-return]

    @torch.inference_mode()
    def all_logits(self, tokens: Tensor) -> Tensor:
        """As `forward` without padding, with the logits after every token: ``[B, Q, vocabulary]``."""
        length = tokens.shape[1]
        positions = (self.offset + self.lengths[:, None] + torch.arange(length)).to(self.layout.device)
        self.cache.begin(positions, torch.ones_like(positions, dtype=torch.bool))
        output = self.model(
            input_ids=tokens.to(self.layout.device),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            m3_cache=self.cache,
        )
        self.cache.commit()
        self.lengths += length
        return output.logits  # type: ignore[no-any-return]


@torch.inference_mode()
def make_sink(model: Any, tokens: Sequence[int]) -> Sink:
    """Keys and values of the constant prefix at positions ``[0, len(tokens))``."""
    session = Session(model, batch=1, context=len(tokens))
    session.forward(torch.tensor([list(tokens)]), logits=False)
    parts = [session.cache.context(layer) for layer in range(session.layout.layers)]
    return torch.stack([k[0] for k, _ in parts]), torch.stack([v[0] for _, v in parts])
