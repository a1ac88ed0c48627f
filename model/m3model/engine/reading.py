"""`ChunkReader`: reads prompts chunk by chunk, each chunk with memories of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from m3model.engine.session import Session
from m3runtime.adapters.answers import Prompt
from m3runtime.errors import InputError
from m3runtime.recall.recalled import Recalled
from m3runtime.stream import Recaller, Stream

PREFILL = 512
"""Tokens of a prompt that are read at once where no memories are recalled."""


@dataclass(slots=True)
class Row:
    """One sequence of the batch."""

    prompt: Prompt
    ids: list[int]
    """Tokens of the prompt."""
    tokens: list[int] = field(default_factory=list)
    """Tokens after it."""
    chunks: list[Recalled] = field(default_factory=list)


AnyRow = TypeVar("AnyRow", bound=Row)


class ChunkReader(Generic[AnyRow]):
    """The sequences of a session and the streams that recall for them; generating and scoring build on it."""

    def __init__(
        self, session: Session, tokenizer: Any, rows: Sequence[AnyRow], streams: Sequence[Stream] | None
    ) -> None:
        """Raises `InputError` for a prompt without tokens."""
        if any(not row.ids for row in rows):
            raise InputError("a prompt needs at least one token")
        self.session = session
        self.tokenizer = tokenizer
        self.rows = rows
        self.streams = streams
        self.recaller: Recaller | None = streams[0].runtime if streams else None

    def read_prompts(self) -> Tensor:
        """Read all rows in parallel, chunk by chunk; returns the logits after each row's last token."""
        size = self.recaller.config.recall.chunk_tokens if self.recaller else PREFILL
        longest = max(len(row.ids) for row in self.rows)
        after: dict[int, Tensor] = {}
        texts = self._queries(0, size)
        for start in range(0, longest, size):
            parts = [row.ids[start : start + size] for row in self.rows]
            if self.recaller:
                self.recall(texts, wait=True)
                texts, read = self._queries(start + size, size), texts
                self._hint(texts, read)
            ends = [index for index, row in enumerate(self.rows) if start < len(row.ids) <= start + size]
            counts = [len(part) for part in parts]
            if ends:
                logits = self.session.forward(padded(parts), counts)
                after |= {index: logits[index] for index in ends}
            else:
                self.session.feed(padded(parts), counts)
        return torch.stack([after[index] for index in range(len(self.rows))])

    def _hint(self, texts: Sequence[str | None], read: Sequence[str | None]) -> None:
        """While the chunks of ``read`` are read, look ahead for the texts that differ from theirs."""
        if self.recaller and self.recaller.config.recall.lookahead_tokens:
            self.hint([None if text == now else text for text, now in zip(texts, read, strict=True)])

    def hint(self, texts: Sequence[str | None]) -> None:
        """Look ahead for the rows that have a text, in one call: they are embedded and searched together."""
        assert self.recaller
        assert self.streams
        asking = [index for index, text in enumerate(texts) if text is not None]
        if asking:
            self.recaller.hint([self.streams[i] for i in asking], [texts[i] or "" for i in asking])

    def recall(self, texts: Sequence[str | None], *, wait: bool | None = None) -> None:
        """New memories for the rows that have a text; the others keep theirs (they are at no boundary)."""
        assert self.recaller
        assert self.streams
        asking = [index for index, text in enumerate(texts) if text is not None]
        if not asking:
            return
        recalled = self.recaller.recall([self.streams[i] for i in asking], [texts[i] or "" for i in asking], wait=wait)
        for index, one in zip(asking, recalled, strict=True):
            row = self.rows[index]
            row.chunks[-1:] = [last.without_parts() for last in row.chunks[-1:]]  # or a long answer keeps them all
            row.chunks.append(one)
        self.attend()

    def attend(self) -> None:
        """Let every row attend to what was recalled for it last."""
        now = [row.chunks[-1] if row.chunks else None for row in self.rows]
        self.session.read(
            [one.parts if one else () for one in now],
            [one.log_weights if one else () for one in now],
            [one.ids if one else () for one in now],
        )

    def decode(self, tokens: Sequence[int]) -> str:
        """Tokens as text, without special tokens."""
        # No clean-up: it would take back spaces that were shown.
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _queries(self, start: int, size: int) -> list[str | None]:
        """The texts to recall by for the prompts' chunks from ``start`` on; None for a row that ends before."""
        if not self.recaller:
            return []
        return [
            (row.prompt.query or self.decode(row.ids[start : start + size])) if start < len(row.ids) else None
            for row in self.rows
        ]


def padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of tokens as ``int64[B, longest]``, padded on the right."""
    width = max(len(row) for row in rows)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
