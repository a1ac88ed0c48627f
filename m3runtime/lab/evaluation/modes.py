"""The modes of an evaluation: one model, one question, and references given to the model in different ways."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal

from m3runtime.adapters.answers import Form, Prompt
from m3runtime.adapters.base import Adapter
from m3runtime.documents.reference import Reference
from m3runtime.lab.evaluation.laboratory import Choice, Laboratory
from m3runtime.lab.evaluation.world import Question
from m3runtime.retrieval.match import Match
from m3runtime.runtime import Runtime
from m3runtime.stream import Stream

Mode = Literal["none", "text", "text-1", "text-5", "text-oracle", "memory", "memory-oracle"]
NEAREST = 8
"""Number of nearest memories that an evaluation looks at."""
PLAIN: dict[Mode, int] = {"text-1": 1, "text-5": 5}
"""Number of references that plain retrieval puts into a prompt: 5, as in Memory³ and most others, or 1."""
SEARCHING: tuple[Mode, ...] = ("text", *PLAIN)
"""Modes that search before the model is asked."""
MODES: dict[Mode, str] = {
    "none": "the model alone",
    "text": "the references that memory recalls, as text in the prompt",
    "text-1": "plain text retrieval: the nearest reference as text in the prompt",
    "text-5": "plain text retrieval: the 5 nearest references as text in the prompt",
    "text-oracle": "the right reference alone, as text in the prompt",
    "memory": "memories as recalled",
    "memory-oracle": "the memory of the right reference alone",
}
NEEDS_ANSWER: tuple[Mode, ...] = ("text-oracle", "memory-oracle")
"""Modes that a question without an answer does not have."""


@dataclass(frozen=True, slots=True)
class Item:
    """One question, and the memories that were found for it."""

    key: str
    question: Question
    asked: str
    """The question, or the statement to complete. It is in the prompt, and memories are searched for it."""
    nearest: tuple[Match, ...]
    """The nearest memories, whatever their scores."""
    recalled: tuple[Match, ...]
    """The nearest memories that pass the rules of the configuration."""
    right: int | None
    """The id of the memory that holds the answer; None if there is none."""


class Asker:
    """Asks a model in any mode. One thread."""

    def __init__(self, adapter: Adapter, runtime: Runtime, references: Mapping[int, Reference], form: Form) -> None:
        """``references`` has the reference of every id that an item names."""
        self.adapter = adapter
        self.runtime = runtime
        self.references = references
        self.form = form

    @contextmanager
    def ready(self, mode: Mode, items: Sequence[Item]) -> Iterator[tuple[list[Prompt], list[Stream] | None]]:
        """The prompts and the streams of a batch; the streams are closed at the end of the block."""
        prompts = [self._prompt(mode, item) for item in items]
        with ExitStack() as closing:
            streams: list[Stream] | None = None
            if mode == "memory":
                streams = [closing.enter_context(self.runtime.stream(self.adapter.dtype)) for _ in items]
            elif mode == "memory-oracle":
                laboratory = self._laboratory(items)
                streams = [closing.enter_context(laboratory.stream(self.adapter.dtype)) for _ in items]
            yield prompts, streams

    def length(self, mode: Mode, item: Item) -> int:
        """The number of tokens in an item's prompt."""
        return self.adapter.count_tokens(self._prompt(mode, item).text)

    def _prompt(self, mode: Mode, item: Item) -> Prompt:
        return self.adapter.render(item.asked, self.form, self.texts(mode, item))

    def texts(self, mode: Mode, item: Item) -> list[str] | None:
        """The references in an item's prompt, or None if the mode puts none into it."""
        ids: Sequence[int]
        if mode == "text":
            ids = [match.id for match in item.recalled]
        elif mode in PLAIN:
            ids = [match.id for match in item.nearest[: PLAIN[mode]]]
        elif mode == "text-oracle" and item.right is not None:
            ids = [item.right]
        else:
            return None
        return [self.references[id].headed for id in ids]

    def _laboratory(self, items: Sequence[Item]) -> Laboratory:
        """A `Laboratory` that recalls the right memory of each item, and no other."""
        right = {item.asked: item.right for item in items if item.right is not None}
        parts = self.runtime.fetch(list(dict.fromkeys(right.values())), self.adapter.dtype)
        choices = {asked: [Choice(id, 1.0)] for asked, id in right.items() if id in parts}
        return Laboratory(self.runtime.config, self.adapter.spec, parts, self.references, choices)
