"""Scores texts: the chunks of decoding, with tokens that are given instead of chosen."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from m3model.engine.reading import PREFILL, ChunkReader, Row, padded
from m3model.engine.session import Session
from m3runtime.adapters.answers import Score
from m3runtime.stream import Stream


class Scoring(ChunkReader[Row]):
    """Scores one continuation of each prompt. The rows' ``tokens`` are the continuations'."""

    def __init__(self, session: Session, tokenizer: Any, rows: Sequence[Row], streams: Sequence[Stream] | None) -> None:
        super().__init__(session, tokenizer, rows, streams)
        self._log_probs: list[list[float]] = [[] for _ in rows]

    def run(self, after: Tensor | None = None) -> list[Score]:
        """Read the prompts, then the continuations, recalling where decoding them would have recalled.

        ``after`` are the logits after the prompts, where they were read already. A row without tokens scores nothing.
        """
        self._take((self.read_prompts() if after is None else after)[:, None], 0)
        size = self.recaller.config.recall.chunk_tokens if self.recaller else PREFILL
        longest = max(len(row.tokens) for row in self.rows)
        start = 0
        # Decoding recalls before it reads a chunk's last token, and nobody asks what follows the very last one.
        for end in [*range(size - 1, longest - 1, size), longest - 1]:
            if start and self.recaller:
                texts = [row.tokens[start + 1 - size : start + 1] for row in self.rows]
                going_on = [len(row.tokens) > start + 1 for row in self.rows]
                self.recall([self.decode(text) if more else None for text, more in zip(texts, going_on, strict=True)])
            parts = [row.tokens[start : max(0, min(end, len(row.tokens) - 1))] for row in self.rows]
            if any(parts):
                self._take(self.session.all_logits(padded(parts), [len(part) for part in parts]), start + 1)
            start = end
        return [
            Score(tuple(log_probs), tuple(row.chunks))
            for row, log_probs in zip(self.rows, self._log_probs, strict=True)
        ]

    def _take(self, logits: Tensor, first: int) -> None:
        """Note how likely the rows' tokens from ``first`` on were, by logits ``[B, Q, vocabulary]``."""
        for row, scores, log_probs in zip(self.rows, logits, self._log_probs, strict=True):
            tokens = torch.tensor(row.tokens[first : first + len(scores)], dtype=torch.int64, device=scores.device)
            chosen = scores[: len(tokens)].float().log_softmax(-1).gather(1, tokens[:, None])
            log_probs.extend(chosen[:, 0].tolist())
