"""The fields of requests that several routes have, and the settings of the engine that they stand for.

A field that is not described here or in the route's own model is refused by name. A field that is null counts as left
out.
"""

import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from m3runtime.config.schema import GenerateConfig
from m3runtime.config.where import Where, conditions, in_sources
from m3runtime.retrieval.restriction import Restriction
from m3runtime.serve.access import OPEN, OPEN_FOLDER
from m3runtime.serve.errors import ApiError, unsupported
from m3runtime.serve.served import Served

Count = Annotated[int, Field(ge=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Token = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Source = Annotated[str, Field(min_length=1, max_length=4096)]


def is_text(value: object) -> bool:
    """Can a value be written in UTF-8, if it is a text? JSON can escape what cannot."""
    try:
        return not isinstance(value, str) or bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


class Fields(BaseModel):
    """A request, or a part of one."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, values: object) -> object:
        if not isinstance(values, dict):
            return values
        kept = {name: value for name, value in values.items() if value is not None}
        for name, value in kept.items():
            inner = (
                value if isinstance(value, list) else [*value, *value.values()] if isinstance(value, dict) else [value]
            )
            if not all(is_text(one) for one in [name, *inner]):
                raise PydanticCustomError("no_text", "a text is not valid Unicode: it has half of a surrogate pair")
        return kept


async def check_query(request: Request) -> None:  # not in a thread: /health needs none
    """A dependency of all routes. Raises `ApiError` for a query that a route does not take, or a name given twice.

    A route that takes a query has a model of it, which refuses unknown fields. Paths that need no key take any query:
    monitors and links bring their own, and nothing there could be chosen by one.
    """
    names = [name for name, _ in request.query_params.multi_items()]
    if not names or request.url.path in OPEN or request.url.path.startswith(OPEN_FOLDER):
        return
    if not request.scope["route"].dependant.query_params:
        raise unsupported(min(names))
    if twice := [name for name in names if names.count(name) > 1]:
        raise ApiError(400, f"{twice[0][:80]} is given twice", param=twice[0][:80])


def asked_where(sources: Sequence[str] | None, where: Mapping[str, Any] | None, param: str) -> Where:
    """The conditions of a request. ``param`` is the field of ``where``. Raises `ApiError`."""
    try:
        found = conditions(where or {})
    except ValueError as error:
        raise ApiError(400, f"{param} {error}"[:300], param=param) from None
    return found if sources is None else found | in_sources(sources)


class MemoryFields(Fields):
    """The field ``memory``: which memories are read. It is ours, not OpenAI's."""

    off: bool = False
    """Read none: the model as it is."""
    as_text: bool = False
    """Put the references into the prompt as text instead, for comparison. For a single message of the user."""
    memories: Annotated[int, Field(ge=0)] | None = None
    """Most memories of a chunk; at most ``recall.memories``."""
    min_score: Annotated[float, Field(ge=-1, le=1)] | None = None
    """Memories that score lower are not read."""
    refresh: Annotated[int, Field(ge=0, le=1000)] = 1
    """Choose memories anew after each so many chunks of the answer; 0: never."""
    sources: Annotated[list[Source], Field(max_length=1000)] | None = None
    """Read memories of these sources, or folders of sources, only."""
    where: dict[str, Any] | None = None
    """Read memories with such metadata only, within ``recall.where``, which has the same form."""
    text: bool = False
    """Report the text of each memory."""

    def restriction(self, served: Served, http: Request) -> Restriction:
        """The restriction of memories, within that of the request's key and ``recall.where``. Raises `ApiError`."""
        most = served.config.recall.memories
        if self.memories is not None and self.memories > most:
            raise ApiError(400, f"memory.memories: at most {most} here", param="memory.memories")
        if self.off and self.as_text:
            raise ApiError(400, "memory.off and memory.as_text exclude each other", param="memory.off")
        where = asked_where(self.sources, self.where, "memory.where")
        return Restriction(
            self.memories, self.min_score, where | http.state.grant.restriction.where | served.runtime.where
        )


class StreamOptions(Fields):
    """The field ``stream_options``."""

    include_usage: bool = False
    """Send the usage in a last chunk."""
    include_obfuscation: bool = False
    """Padding against observers of the traffic; only false is supported."""


class SamplingFields(Fields):
    """The fields of sampling, which routes of answers share. Default: the ``generate`` section."""

    model: str
    stream: bool = False
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    memory: MemoryFields = MemoryFields()
    user: Annotated[str, Field(max_length=512)] | None = None
    """An identifier of the client's user, which changes nothing."""

    def settings(self, served: Served, most_tokens: int | None, param: str, **more: Any) -> GenerateConfig:
        """The settings of the engine. ``param`` is the field of ``most_tokens``. Raises `ApiError`."""
        if self.model != served.name:
            message = f"the model {self.model!r} is not served here; {served.name!r} is"
            raise ApiError(404, message[:300], param="model", code="model_not_found")
        limit, base = served.limits.answer_tokens, served.config.generate
        if most_tokens is not None and most_tokens > limit:
            raise ApiError(400, f"{param}: an answer may have at most {limit} tokens here", param=param)
        given = {
            "max_new_tokens": min(base.max_new_tokens, limit) if most_tokens is None else most_tokens,
            **{name: getattr(self, name) for name in _SAMPLING},
            "grounding": served.adapter.grounds,
            **more,
        }
        return base.model_copy(update={name: value for name, value in given.items() if value is not None})


_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


class PenaltyFields(SamplingFields):
    """The further fields of chat completions and of text completions."""

    stream_options: StreamOptions | None = None
    n: Count = 1
    seed: Annotated[int, Field(ge=0, lt=1 << 62)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[Token, Bias], Field(max_length=1024)] | None = None

    def penalised(self, served: Served, most_tokens: int | None, param: str, log_probs: int | None) -> GenerateConfig:
        """The settings of the engine, of the first answer. Raises `ApiError`."""
        if self.n > served.limits.choices:
            raise ApiError(400, f"n: at most {served.limits.choices} answers here", param="n")
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options: only with stream", param="stream_options")
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            name = "stream_options.include_obfuscation"
            raise ApiError(400, f"{name} is not supported", param=name, code="unsupported_parameter")
        bias = self.logit_bias
        return self.settings(
            served,
            most_tokens,
            param,
            stop=None if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            seed=secrets.randbelow(1 << 31) if self.seed is None else self.seed,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=None if bias is None else {int(token): value for token, value in bias.items()},
            log_probs=log_probs,
        )
