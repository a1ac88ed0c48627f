"""`PromptTokens`: the token ids of references, of the sink and of prompts."""

from collections.abc import Iterator
from typing import Any

from m3model.engine.markers import literal_tokenizer
from m3model.engine.prompts import turn_head
from m3runtime.adapters.answers import Prompt
from m3runtime.config.schema import MemoryConfig
from m3runtime.errors import ConfigError


class PromptTokens:
    """A tokenizer that knows the sink. Thread-safe as far as the tokenizer is."""

    def __init__(self, tokenizer: Any, memory: MemoryConfig) -> None:
        """Raises `ConfigError` for a sink without tokens, and for ``memory.place`` turn without a chat template."""
        self.tokenizer = tokenizer
        self.literal = literal_tokenizer(tokenizer)
        """The tokenizer for documents and for the words of users, in which it knows no special tokens."""
        # In the user's turn, the template's beginning is the same for every conversation: it is computed once, as sink.
        self._head = turn_head(tokenizer) if memory.place == "turn" else ""
        self.sink = self._head + memory.sink
        self.sink_ids = self._ids(self.tokenizer, self.sink)
        self._bos: int | None = tokenizer.bos_token_id
        if self._bos is not None and not (self._head and self.sink_ids[0] == self._bos):
            self.sink_ids = [self._bos, *self.sink_ids]
        if not self.sink_ids:
            raise ConfigError("memory.sink: the sink has no token; this model needs some text there")

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, in which markers of special tokens are text."""
        return self._ids(self.literal, text)

    def of_prompt(self, prompt: Prompt, *, sink: bool) -> list[int]:
        """The tokens of a prompt after the sink, or without one; with exactly one BOS before both, if the model has it.

        Raises `ConfigError` for a prompt that does not begin with the turn that the sink is in.
        """
        if sink and self._head:
            if not prompt.text.startswith(self._head):
                raise ConfigError(
                    "memory.place is turn: prompts must be in the chat template and begin with the user; "
                    "set generate.prompt to chat, or memory.place to start"
                )
            return self._of(prompt, len(self._head), "\n\n")
        ids = self._of(prompt)
        if self._bos is None:
            return ids
        begins = ids[:1] == [self._bos]
        if sink:
            # A template that writes it again and again (SmolLM2's) means more by it than a beginning.
            return ids[1:] if begins and ids.count(self._bos) == 1 else ids
        return ids if begins else [self._bos, *ids]

    def _of(self, prompt: Prompt, start: int = 0, before: str = "") -> list[int]:
        """The tokens of a prompt's text from ``start`` on, after other words."""
        ids: list[int] = []
        for begin, end in prompt.literal:
            ids += self._ids(self.tokenizer, before + prompt.text[start:begin]) + self.ids(prompt.text[begin:end])
            start, before = end, ""
        return ids + self._ids(self.tokenizer, before + prompt.text[start:])

    def _ids(self, tokenizer: Any, text: str) -> list[int]:
        # `verbose=False`: a whole document may be counted, and that it exceeds the model's context is no news.
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]


def stop_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: those of the generation configuration, and the tokenizer's own."""

    def flat(value: Any) -> Iterator[int]:
        if isinstance(value, int):
            yield value
        elif value is not None:
            yield from value

    return frozenset([*flat(model.generation_config.eos_token_id), *flat(tokenizer.eos_token_id)])
