"""The messages of a conversation, and the prompt that they are for the model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from m3runtime.adapters.answers import Prompt
from m3runtime.documents.reference import Reference
from m3runtime.errors import ConfigError
from m3runtime.retrieval.restriction import Restriction
from m3runtime.serve.errors import ApiError
from m3runtime.serve.fields import Fields
from m3runtime.serve.served import Served

Told = Annotated[Sequence[Any], Field(max_length=4096)]
"""Fields that this server told with an earlier answer: clients give them back as they came, and nothing changes."""


class TextPart(Fields):
    """A part of a message. Only text is supported."""

    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: Told = ()
    logprobs: Told = ()


class Message(Fields):
    """One message."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=1024)]
    annotations: Told = ()
    memories: Told = ()
    references: Told = ()
    found: bool | None = None
    """Told with an earlier answer, as well."""

    @model_validator(mode="after")
    def _tells_of_answers_only(self) -> Self:
        told = self.annotations or self.memories or self.references or self.found is not None
        if self.role != "assistant" and told:
            raise PydanticCustomError("no_answer", "only an answer has annotations, memories, references or found")
        return self

    @property
    def text(self) -> str:
        """Its text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


Messages = Annotated[list[Message], Field(min_length=1, max_length=4096)]


@dataclass(frozen=True, slots=True)
class Asked:
    """The prompt of a conversation."""

    prompt: Prompt
    references: tuple[tuple[int, float, Reference], ...] = ()
    """The references that stand in it as text: id, score and reference of each."""


def prompt_of(served: Served, messages: Sequence[Message], restriction: Restriction | None) -> Asked:
    """The prompt of a conversation. With ``restriction`` the references that it allows stand in it as text.

    A single message of the user is asked in the form of ``generate.prompt``, as `m3 ask` does; any other conversation
    is written by the model's chat template. Runs in a thread. Raises `ApiError`.
    """
    try:
        if len(messages) == 1 and messages[0].role == "user":
            question = messages[0].text
            references = () if restriction is None else _search(served, question, restriction)
            texts = None if restriction is None else [one.headed for _, _, one in references]
            return Asked(served.adapter.render(question, served.config.generate.prompt, texts), references)
        if restriction is not None:
            raise ApiError(400, "memory.as_text: only for a single message of the user", param="memory.as_text")
        roles = {"developer": "system"}
        turns = [{"role": roles.get(one.role, one.role), "content": one.text} for one in messages]
        return Asked(served.adapter.chat(turns))
    except ConfigError as error:  # the model has no chat template, or one that refuses these messages
        raise ApiError(400, str(error)[:300], param="messages") from None


def _search(served: Served, question: str, restriction: Restriction) -> tuple[tuple[int, float, Reference], ...]:
    (matches,) = served.runtime.search([question], restriction=restriction)
    found = served.runtime.cited(matches)
    return tuple((match.id, match.score, one) for match, one in zip(matches, found, strict=True) if one is not None)
