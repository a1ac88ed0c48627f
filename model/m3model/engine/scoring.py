"""Scores texts: the chunks of decoding, with tokens that are given instead of chosen."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from m3model.engine.scheduler import ALONE_TOKENS
from m3model.engine.session import Session
from m3runtime.adapters.answers import Prompt, Score
from m3runtime.errors import InputError
from m3runtime.recall.recalled import Recalled
from m3runtime.stream import Recaller, Stream


@dataclass(slots=True)
class Row:
    """A prompt and its continuation."""

    prompt: Prompt
    ids: list[int]
    """Tokens of the prompt."""
    tokens: list[int]
    """Tokens of the continuation."""
    chunks: list[Recalled] = field(default_factory=list)


class Scoring:
    """Scores one continuation of each prompt."""

    def __init__(self, session: Session, tokenizer: Any, rows: Sequence[Row], streams: Sequence[Stream] | None) -> None:
        """Raises `InputError` for a prompt without tokens."""
        if any(not row.ids for row in rows):
            raise InputError("a prompt needs at least one token")
        self._session = session
        self._tokenizer = tokenizer
        self._rows = rows
        self._streams = streams
        self._recaller: Recaller | None = streams[0].runtime if streams else None
        self._log_probs: list[list[float]] = [[] for _ in rows]
        self._size = self._recaller.config.recall.chunk_tokens if self._recaller else ALONE_TOKENS

    def run(self) -> list[Score]:
        """Read the prompts, then the continuations, recalling where decoding them would have recalled."""
        self._take(self._read_prompts()[:, None], 0)
        size, longest, start = self._size, max(len(row.tokens) for row in self._rows), 0
        # Decoding recalls before it reads a chunk's last token, and nobody asks what follows the very last one.
        for number, end in enumerate([*range(size - 1, longest - 1, size), longest - 1]):
            if number:
                chunks = [row.tokens[start + 1 - size : start + 1] for row in self._rows]
                goes_on = [len(row.tokens) > start + 1 for row in self._rows]
                self._recall([self._searched(one) if more else None for one, more in zip(chunks, goes_on, strict=True)])
            parts = [row.tokens[start : max(0, min(end, len(row.tokens) - 1))] for row in self._rows]
            if any(parts):
                self._take(self._session.all_logits(padded(parts), [len(part) for part in parts]), start + 1)
            start = end
        return [
            Score(tuple(log_probs), tuple(row.chunks))
            for row, log_probs in zip(self._rows, self._log_probs, strict=True)
        ]

    def _read_prompts(self) -> Tensor:
        """Read all prompts in parallel, chunk by chunk; returns the logits after each one's last token."""
        longest = max(len(row.ids) for row in self._rows)
        after: dict[int, Tensor] = {}
        for start in range(0, longest, self._size):
            parts = [row.ids[start : start + self._size] for row in self._rows]
            self._recall(
                [
                    (row.prompt.query or self._decode(part)) if part else None
                    for row, part in zip(self._rows, parts, strict=True)
                ],
                wait=True,
            )
            logits = self._session.forward(padded(parts), [len(part) for part in parts])
            ends = [i for i, row in enumerate(self._rows) if start < len(row.ids) <= start + self._size]
            after |= {index: logits[index] for index in ends}
        return torch.stack([after[index] for index in range(len(self._rows))])

    def _recall(self, texts: Sequence[str | None], *, wait: bool | None = None) -> None:
        """New memories for the rows that have a text; the others keep theirs (they are at no boundary)."""
        asking = [index for index, text in enumerate(texts) if text is not None]
        if not self._recaller or not self._streams or not asking:
            return
        streams = [self._streams[i] for i in asking]
        recalled = self._recaller.recall(streams, [texts[i] or "" for i in asking], wait=wait)
        for index, one in zip(asking, recalled, strict=True):
            row = self._rows[index]
            row.chunks[-1:] = [last.without_parts() for last in row.chunks[-1:]]  # or a long text keeps them all
            row.chunks.append(one)
        now = [row.chunks[-1] if row.chunks else None for row in self._rows]
        self._session.read(
            [one.parts if one else () for one in now],
            [one.log_weights if one else () for one in now],
            [one.ids if one else () for one in now],
        )

    def _searched(self, chunk: Sequence[int]) -> str:
        """The text of a chunk by which memories are chosen."""
        return self._decode(self._recaller.config.recall.searched(chunk) if self._recaller else chunk)

    def _decode(self, tokens: Sequence[int]) -> str:
        return decode(self._tokenizer, tokens)

    def _take(self, logits: Tensor, first: int) -> None:
        """Note how likely the rows' tokens from ``first`` on were, by logits ``[B, Q, vocabulary]``."""
        for row, scores, log_probs in zip(self._rows, logits, self._log_probs, strict=True):
            tokens = torch.tensor(row.tokens[first : first + len(scores)], dtype=torch.int64, device=scores.device)
            chosen = scores[: len(tokens)].float().log_softmax(-1).gather(1, tokens[:, None])
            log_probs.extend(chosen[:, 0].tolist())


def decode(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Tokens as text, without special tokens."""
    # No clean-up: it would take back spaces that were shown.
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of tokens as ``int64[B, longest]``, padded on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
