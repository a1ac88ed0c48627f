"""`Written`: what is known of one answer while it comes, and the parts of OpenAI's objects that all routes share."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from m3runtime.adapters.answers import Answer, TokenLogProb
from m3runtime.adapters.base import Adapter
from m3runtime.adapters.engine import End, Event, Failure, Piece, Read
from m3runtime.serve.answering import Answering
from m3runtime.serve.citing import Reads

FINISHED = {"token": "stop", "text": "stop", "length": "length", "cancel": "stop"}


@dataclass(slots=True)
class Written:
    """One answer, event by event."""

    reads: Reads
    is_message: bool = True
    """Is it a message of its own, not the end of a text? Then it does not begin with white space."""
    text: str = ""
    log_probs: list[TokenLogProb] = field(default_factory=list)
    answer: Answer | None = None

    def take(self, event: Event) -> str:
        """Take the next event, and return the text that it adds. Raises the error of a `Failure`."""
        text = ""
        if isinstance(event, Read):
            self.reads.begin(event.recalled, len(self.text))
        elif isinstance(event, Piece):
            text = event.text if self.text or not self.is_message else event.text.lstrip()
            self.text += text
            self.log_probs += event.log_probs
        elif isinstance(event, End):
            self.answer = event.answer
            self.reads.end(len(self.text))
            self.reads.grounded = event.answer.grounded
            if (grounding := event.answer.grounding) is not None:
                whole = event.answer.text
                self.reads.ground(grounding, len(whole) - len(whole.lstrip()) if self.is_message else 0)
        elif isinstance(event, Failure):
            raise event.error
        return text

    @property
    def finish_reason(self) -> str:
        """OpenAI's word for how it ended."""
        return FINISHED[self.answer.stopped_by] if self.answer else "stop"


async def collect(answering: Answering, written: Sequence[Written]) -> None:
    """Wait for all answers. Raises the error of the first that fails."""
    async for index, event in answering:
        written[index].take(event)


def usage(answering: Answering, written: Iterable[Written]) -> dict[str, Any]:
    """The tokens of a request. Those of memories, each once, count as prompt tokens that were cached."""
    answers = list(written)
    memories = sum({id: tokens for one in answers for id, tokens in one.reads.tokens.items()}.values())
    answered = sum(len(one.answer.tokens) for one in answers if one.answer)
    prompt = answering.prompt_tokens + memories
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answered,
        "total_tokens": prompt + answered,
        "prompt_tokens_details": {"cached_tokens": memories},
    }


def chat_log_probs(adapter: Adapter, log_probs: Iterable[TokenLogProb]) -> dict[str, Any]:
    """The log probabilities of tokens, in the form of chat completions."""

    def entry(token: int, log_prob: float) -> dict[str, Any]:
        text = adapter.text_of([token])
        # A part of a character has no text of its own, and the tokenizer does not tell its bytes.
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": max(log_prob, -9999.0), "bytes": data}

    return {
        "content": [
            {**entry(one.token, one.log_prob), "top_logprobs": [entry(*other) for other in one.likeliest]}
            for one in log_probs
        ],
        "refusal": None,
    }


class TextLogProbs:
    """Writes the log probabilities of one answer's tokens in the form of text completions, bit by bit or at once."""

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._place = 0
        """Characters of the answer before `_part`."""
        self._part: list[int] = []
        """Tokens of a character that is not whole yet."""

    def told(self, log_probs: Sequence[TokenLogProb]) -> dict[str, Any]:
        """The next tokens, and the place of each in the answer's text: of the parts of a character, the character's."""
        text_of = self._adapter.text_of
        return {
            "tokens": [text_of([one.token]) for one in log_probs],
            "token_logprobs": [max(one.log_prob, -9999.0) for one in log_probs],
            "top_logprobs": [
                {text_of([token]): max(value, -9999.0) for token, value in one.likeliest} for one in log_probs
            ],
            "text_offset": [self._offset(one.token) for one in log_probs],
        }

    def _offset(self, token: int) -> int:
        before, text = self._adapter.text_of(self._part), self._adapter.text_of([*self._part, token])
        if len(text) > len(before) and text.startswith(before):  # no part of that character, which stays broken
            self._place += len(before)
            self._part, text = [], text[len(before) :]
        place = self._place
        self._part.append(token)
        if not text.endswith("\ufffd"):
            self._place += len(text)
            self._part = []
        return place
