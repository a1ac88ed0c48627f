"""`Wish`: what a request says about memories, in its ``kv_transfer_params``; and the head of its prompt."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from m3runtime.config.section import Count, Section, Whole
from m3runtime.config.where import conditions, in_sources
from m3runtime.errors import InputError
from m3runtime.plugins.messages import first_fault
from m3runtime.retrieval.restriction import Restriction

_MOST = 64
"""Most ids of a chunk, and most chunks that a request names memories for."""


def _chunks(value: object) -> object:
    """One list of ids is of all chunks."""
    return [value] if isinstance(value, list) and not any(isinstance(one, list) for one in value) else value


def _where(value: object) -> object:
    several = [*value] if isinstance(value, list | tuple) else [value]
    for one in several:
        conditions(one)  # raises
    return several


Id = Annotated[Whole, Field(ge=0, lt=1 << 63)]
Ids = Annotated[tuple[Id, ...], Field(max_length=_MOST)]


class Wish(Section):
    """``kv_transfer_params: {"m3": {...}}``. Without any key memories are recalled as the bank's configuration says."""

    ids: Annotated[tuple[Ids, ...] | None, BeforeValidator(_chunks), Field(max_length=_MOST)] = None
    """Read these memories and recall none; or a list for each chunk of the answer, of which the last one stays."""
    log_weights: Annotated[tuple[tuple[float, ...], ...] | None, BeforeValidator(_chunks)] = None
    """For each of the ids, at most 0: added to the attention logits of its keys."""
    off: bool = False
    """Read the sink and no memories."""
    memories: Count | None = None
    """Most memories of a chunk, at most ``recall.memories``."""
    min_score: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Memories that score lower are not read."""
    sources: tuple[str, ...] | None = None
    """Memories of these sources, or folders of sources, only."""
    where: Annotated[tuple[Mapping[str, Any], ...], BeforeValidator(_where)] = ()
    """Memories with such metadata only: see ``recall.where``; of a list of mappings, all must hold."""
    refresh: bool | Annotated[Whole, Field(ge=0)] = True
    """Recall anew after each chunk of the answer, after each so many, or never."""
    query: Annotated[str, Field(max_length=1 << 16)] | None = None
    """What the prompt's memories are searched for by; without it, the end of the prompt."""
    stream: int | None = None
    """An engine's own: the number of a stream of its process."""

    @model_validator(mode="after")
    def _weigh_what_is_named(self) -> "Wish":
        if self.log_weights is not None:
            shape = [len(one) for one in self.ids or ()]
            if [len(one) for one in self.log_weights] != shape:
                raise ValueError("log_weights must have a number for each of the ids")
            if any(not -80 <= weight <= 0 for one in self.log_weights for weight in one):
                raise ValueError("log_weights must be between -80 and 0")
        return self

    @property
    def restriction(self) -> Restriction:
        """The limits of its recalls."""
        where = frozenset(one for each in self.where for one in conditions(each))
        return Restriction(
            self.memories, self.min_score, where if self.sources is None else where | in_sources(self.sources)
        )

    @property
    def every(self) -> int:
        """Chunks of the answer from one recall to the next; 0: it recalls nothing."""
        return 0 if self.off else int(self.refresh)

    @property
    def shares(self) -> bool:
        """Does it read the same as any other request with this wish?"""
        return self.off or (self.ids is not None and (len(self.ids) == 1 or not self.every))

    @classmethod
    def of(cls, params: Mapping[str, Any]) -> "Wish | None":
        """The wish in ``kv_transfer_params``, or None. Raises `InputError` with the first thing that is wrong."""
        if "m3" not in params:
            return None
        try:
            return cls.model_validate({} if params["m3"] is None else params["m3"])
        except ValidationError as error:
            raise InputError(f"kv_transfer_params.m3: {first_fault(error)}") from None


@dataclass(frozen=True, slots=True)
class Head:
    """The tokens that a prompt begins with to read memories: the sink, and a placeholder for each slot."""

    sink: tuple[int, ...]
    slots: int
    """Tokens of memories that there is room for."""
    placeholder: int
    """A token that stands for a slot. It is never read."""

    def __len__(self) -> int:
        return len(self.sink) + self.slots

    @property
    def ids(self) -> list[int]:
        """All of them."""
        return [*self.sink, *[self.placeholder] * self.slots]

    def begins(self, prompt: Sequence[int]) -> bool:
        """Does a prompt begin with it? One placeholder more or less is not it."""
        size = len(self)
        own = len(prompt) > size and prompt[size] != self.placeholder
        return own and list(prompt[:size]) == self.ids

    def resembles(self, prompt: Sequence[int]) -> bool:
        """Does a prompt begin as if it was meant to read memories? So no text begins."""
        few = min(len(prompt), len(self), len(self.sink) + 4)
        return few > len(self.sink) and list(prompt[:few]) == self.ids[:few]
