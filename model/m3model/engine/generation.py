"""The loop over chunks: read the prompt and decode, recalling memories at every chunk."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from m3model.engine.detokenizing import Detokenizer
from m3model.engine.reading import ChunkReader, Row
from m3model.engine.sampling import Sampler
from m3model.engine.session import Session
from m3runtime.adapters.answers import Answer, OnText, Prompt
from m3runtime.config.schema import GenerateConfig
from m3runtime.stream import Stream


@dataclass(slots=True)
class _Row(Row):
    """A sequence, and the length of its text that was shown."""

    detokenizer: Detokenizer = field(kw_only=True)
    text: str = ""
    shown: int = 0
    stopped_by: Literal["token", "text", "length"] | None = None
    first_s: float = 0.0
    last_s: float = 0.0


class Generation(ChunkReader[_Row]):
    """Continues a batch of prompts once."""

    def __init__(
        self,
        session: Session,
        tokenizer: Any,
        prompts: Sequence[Prompt],
        ids: Sequence[list[int]],
        streams: Sequence[Stream] | None,
        settings: GenerateConfig,
        stop_tokens: frozenset[int],
        on_text: OnText | None,
    ) -> None:
        rows = [
            _Row(prompt, list(row), detokenizer=Detokenizer(self.decode))
            for prompt, row in zip(prompts, ids, strict=True)
        ]
        super().__init__(session, tokenizer, rows, streams)
        self.settings = settings
        self.stop_tokens = stop_tokens
        self.on_text = on_text
        self.watched = on_text is not None or bool(settings.stop)
        """Is the text needed while it is written?"""
        self.sampler = Sampler(settings, [row.ids for row in rows])

    def run(self, began: float, after: torch.Tensor | None = None) -> list[Answer]:
        """Read the prompts, then decode until every row has stopped. ``began`` is when the call began.

        ``after`` are the logits after the prompts, where they were read already.
        """
        logits = self.read_prompts() if after is None else after
        limit = self.settings.max_new_tokens
        for step in range(limit):
            chosen = self.sampler.choose(logits)
            tokens = chosen.tolist()  # the only time in a step that the device is waited for
            now = time.perf_counter() - began
            for index, (row, token) in enumerate(zip(self.rows, tokens, strict=True)):
                self._take(index, row, token, now, last=step == limit - 1)
            if all(row.stopped_by for row in self.rows):
                break
            self._between(step + 1)
            logits = self.session.forward(chosen[:, None])
        return [self._answer(row) for row in self.rows]

    def _between(self, generated: int) -> None:
        """Hint ahead of the chunk's end, and recall at its end."""
        if not self.recaller or not self.streams:
            return
        recall = self.recaller.config.recall
        place = generated % recall.chunk_tokens
        if place == recall.chunk_tokens - recall.lookahead_tokens and recall.lookahead_tokens:
            self.hint([None if row.stopped_by else self._last(row, place) for row in self.rows])
        if place == 0:
            self.recall([None if row.stopped_by else self._last(row, recall.chunk_tokens) for row in self.rows])

    def _last(self, row: _Row, count: int) -> str:
        return self.decode(row.tokens[-count:])

    def _take(self, index: int, row: _Row, token: int, now: float, *, last: bool) -> None:
        """Append a token to a row, unless the row has stopped or the token stops it."""
        if row.stopped_by:
            return
        if not row.first_s:
            row.first_s = now
        row.last_s = now
        if token in self.stop_tokens:
            row.stopped_by = "token"
            self._show(index)
            return
        row.tokens.append(token)
        places: list[int] = []
        if self.watched:
            # What was shown stays: some tokenizers, given more tokens, decode earlier bytes that are no UTF-8 anew.
            row.text = row.text[: row.shown] + row.detokenizer.add(token)[row.shown :]
            # No stop text begins in what was shown, or that would have been held back.
            places = [place for stop in self.settings.stop if (place := row.text.find(stop, row.shown)) >= 0]
        if places:
            row.text = row.text[: min(places)]
            row.stopped_by = "text"
        elif last:
            row.stopped_by = "length"
        self._show(index)

    def _show(self, index: int) -> None:
        """Stream the text that can no longer change: not half a character, and nothing that may become a stop text."""
        row = self.rows[index]
        certain = row.text
        if not row.stopped_by:
            certain = certain.rstrip("\ufffd")
            certain = certain[: min([_overlap(certain, stop) for stop in self.settings.stop], default=None)]
        if len(certain) > row.shown:
            if self.on_text:
                self.on_text(index, certain[row.shown :])
            row.shown = len(certain)

    def _answer(self, row: _Row) -> Answer:
        steps = len(row.tokens) - 1
        elapsed = row.last_s - row.first_s
        return Answer(
            text=row.text if self.watched else self.decode(row.tokens),
            tokens=tuple(row.tokens),
            stopped_by=row.stopped_by or "length",
            chunks=tuple(row.chunks),
            first_token_s=row.first_s,
            tokens_per_s=steps / elapsed if steps > 0 and elapsed > 0 else 0.0,
        )


def _overlap(text: str, stop: str) -> int:
    """The place where the longest end of ``text`` begins that is a beginning of ``stop``."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return len(text) - length
    return len(text)
