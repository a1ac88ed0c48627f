"""`Writing`: the answer of one request, from tokens that come one by one to the text that is shown."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from m3model.engine.detokenizing import Detokenizer
from m3runtime.adapters.answers import Answer, TokenLogProb
from m3runtime.adapters.engine import Piece
from m3runtime.adapters.evidence import evidence
from m3runtime.adapters.grounding import Grounding
from m3runtime.config.schema import GenerateConfig
from m3runtime.recall.recalled import Recalled

Reason = Literal["token", "text", "length", "cancel"]


class Writing:
    """Collects tokens, finds where the text stops, and says what of it is certain. One thread."""

    def __init__(
        self,
        asked: str | None,
        settings: GenerateConfig,
        stop_tokens: frozenset[int],
        decode: Callable[[Sequence[int]], str],
    ) -> None:
        """``asked`` is the question, as memories are searched for it; None if none are read."""
        self.tokens: list[int] = []
        self.chunks: list[Recalled] = []
        self.stopped_by: Reason | None = None
        self._asked = asked
        self._settings = settings
        self._stop_tokens = stop_tokens | frozenset(settings.stop_tokens)
        self._detokenizer = Detokenizer(decode)
        self._text = ""
        self._shown = 0
        self._log_probs: list[TokenLogProb] = []
        self._shares: list[Mapping[int, float]] = []
        self._ends: list[int] = []
        self._began = time.perf_counter()
        self._first_s = self._last_s = 0.0

    def take(
        self, token: int, log_prob: TokenLogProb | None, shares: Mapping[int, float] | None = None
    ) -> Piece | None:
        """Append a token, unless it stops the answer; returns what has become certain by it, if anything has.

        ``shares`` are those of `Grounding`, where they are asked for.
        """
        self._last_s = time.perf_counter() - self._began
        self._first_s = self._first_s or self._last_s
        if token in self._stop_tokens:
            self.stopped_by = "token"
            return self._certain(())
        self.tokens.append(token)
        if log_prob is not None:
            self._log_probs.append(log_prob)
        # What was shown stays: some tokenizers, given more tokens, decode earlier bytes that are no UTF-8 anew.
        self._text = self._text[: self._shown] + self._detokenizer.add(token)[self._shown :]
        # No stop text begins in what was shown, or that would have been held back.
        places = [place for stop in self._settings.stop if (place := self._text.find(stop, self._shown)) >= 0]
        if places:
            self._text = self._text[: min(places)]
            self.stopped_by = "text"
        elif len(self.tokens) == self._settings.max_new_tokens:
            self.stopped_by = "length"
        if shares is not None:
            self._shares.append(shares)
            self._ends.append(len(self._text))
        return self._certain((token,), () if log_prob is None else (log_prob,))

    def end(self, reason: Reason) -> Piece | None:
        """Stop here; returns the text that was held back."""
        self.stopped_by = reason
        return self._certain(())

    def answer(self) -> Answer:
        """The answer so far."""
        steps, elapsed = len(self.tokens) - 1, self._last_s - self._first_s
        grounding, floor = self._grounding() if self._settings.grounding else None, self._settings.grounding_floor
        found: float | None = None
        if grounding is not None and self._asked is not None:
            found = evidence(self._asked, self._text, grounding, self._leading(grounding))
        return Answer(
            text=self._text,
            tokens=tuple(self.tokens),
            stopped_by=self.stopped_by or "length",
            chunks=tuple(self.chunks),
            first_token_s=self._first_s,
            tokens_per_s=steps / elapsed if steps > 0 and elapsed > 0 else 0.0,
            log_probs=tuple(self._log_probs),
            grounding=grounding,
            evidence=found,
            grounded=None if found is None or floor is None else found >= floor,
        )

    def _grounding(self) -> Grounding:
        """The text may be shorter than it was: a stop text, which began in an earlier token, is cut off."""
        return Grounding(tuple(min(end, len(self._text)) for end in self._ends), tuple(self._shares))

    def _leading(self, grounding: Grounding) -> str | None:
        """The text of the memory that was read most."""
        references = (one for chunk in self.chunks for one in zip(chunk.ids, chunk.references, strict=True))
        return next((reference.headed for id, reference in references if id == grounding.leader), None)

    def _certain(self, tokens: tuple[int, ...], log_probs: tuple[TokenLogProb, ...] = ()) -> Piece | None:
        """The text that can no longer change: not half a character, and nothing that may become a stop text."""
        certain = self._text
        if not self.stopped_by:
            certain = certain.rstrip("\ufffd")
            certain = certain[: min([_overlap(certain, stop) for stop in self._settings.stop], default=None)]
        text = certain[self._shown :]
        self._shown = max(self._shown, len(certain))
        return Piece(text, tokens, log_probs) if text or tokens else None


def _overlap(text: str, stop: str) -> int:
    """The place where the longest end of ``text`` begins that is a beginning of ``stop``."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return len(text) - length
    return len(text)
