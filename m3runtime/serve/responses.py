"""``POST /v1/responses``. Answers are not kept, so a response cannot be read again or continued by its id."""

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from m3runtime.config.schema import GenerateConfig
from m3runtime.serve.answering import Answering
from m3runtime.serve.citing import Reads
from m3runtime.serve.conversation import Message, prompt_of
from m3runtime.serve.events import Data, new_id, now, stream
from m3runtime.serve.fields import Count, Fields, SamplingFields
from m3runtime.serve.served import Served
from m3runtime.serve.writing import Written, collect, usage


class Item(Message):
    """A message of the input."""

    type: Literal["message"] = "message"
    id: Annotated[str, Field(max_length=128)] | None = None
    """An earlier answer may be given as it came."""
    status: Literal["completed", "incomplete", "in_progress"] | None = None
    phase: Literal["commentary", "final_answer"] | None = None
    """A label of answers, which chat templates have no place for."""


class TextFormat(Fields):
    """The only format."""

    type: Literal["text"]


class TextOptions(Fields):
    """The field ``text``."""

    format: TextFormat | None = None


class ResponseRequest(SamplingFields):
    """A conversation to continue."""

    input: Annotated[str, Field(min_length=1)] | Annotated[list[Item], Field(min_length=1, max_length=4096)]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    """Repeated in the response."""
    text: TextOptions | None = None
    store: Literal[False] = False
    truncation: Literal["disabled"] = "disabled"

    @property
    def messages(self) -> list[Message]:
        """The whole conversation."""
        given = [Message(role="user", content=self.input)] if isinstance(self.input, str) else list(self.input)
        return [*([Message(role="system", content=self.instructions)] if self.instructions else []), *given]


def router(served: Served) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/responses")
    async def responses(request: ResponseRequest, http: Request) -> Response:
        """Answer a conversation from memory."""
        settings = request.settings(
            served,
            request.max_output_tokens,
            "max_output_tokens",
            presence_penalty=request.presence_penalty,
            frequency_penalty=request.frequency_penalty,
            seed=secrets.randbelow(1 << 31),
        )
        memory = request.memory
        restriction = memory.restriction(served, http)
        asked = await asyncio.to_thread(prompt_of, served, request.messages, restriction if memory.as_text else None)
        reads = None if memory.off or memory.as_text else restriction
        answering = await Answering.begin(served, http, [asked.prompt], [settings], reads, memory.refresh)
        written = Written(Reads(restriction, memory.text))
        if memory.as_text:
            written.reads.put_in_prompt(asked.references)
        response = _Response(served, request, settings, answering, written)
        if request.stream:
            return stream(response.events(), done=False)
        await collect(answering, [written])
        return JSONResponse(response.whole())

    return routes


class _Response:
    """The objects of one request."""

    def __init__(
        self,
        served: Served,
        request: ResponseRequest,
        settings: GenerateConfig,
        answering: Answering,
        written: Written,
    ) -> None:
        self._request = request
        self._settings = settings
        self._answering = answering
        self._written = written
        self._item = new_id("msg")
        self._head = {"id": new_id("resp"), "object": "response", "created_at": now(), "model": served.name}

    def whole(self) -> Data:
        """The response, as far as it has come."""
        answer, reads = self._written.answer, self._written.reads
        cut = answer is not None and answer.stopped_by == "length"
        status = "in_progress" if answer is None else "incomplete" if cut else "completed"
        return {
            **self._head,
            "status": status,
            "completed_at": now() if status == "completed" else None,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "frequency_penalty": self._settings.frequency_penalty,
            "instructions": self._request.instructions,
            "max_output_tokens": self._settings.max_new_tokens,
            "max_tool_calls": None,
            "metadata": self._request.metadata or {},
            "output": [] if answer is None else [self._message(status)],
            "parallel_tool_calls": False,
            "presence_penalty": self._settings.presence_penalty,
            "previous_response_id": None,
            "prompt_cache_key": None,
            "reasoning": None,
            "safety_identifier": None,
            "service_tier": "default",
            "store": False,
            "temperature": self._settings.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": 0,
            "top_p": self._settings.top_p,
            "truncation": "disabled",
            "usage": None if answer is None else self._usage(),
            "user": self._request.user,
            **({"memories": reads.memories, **reads.in_prompt} if answer is None else reads.told()),
        }

    async def events(self) -> AsyncIterator[tuple[str, Data]]:
        """The response bit by bit, with the events and numbers that clients expect."""
        number = 0

        def event(name: str, **data: Any) -> tuple[str, Data]:
            nonlocal number
            number += 1
            return name, {"type": name, "sequence_number": number - 1, **data}

        at: dict[str, Any] = {"item_id": self._item, "output_index": 0, "content_index": 0}
        yield event("response.created", response=self.whole())
        yield event("response.in_progress", response=self.whole())
        yield event("response.output_item.added", output_index=0, item=self._message("in_progress"))
        yield event("response.content_part.added", **at, part=self._part())
        async for _, one in self._answering:
            if text := self._written.take(one):
                yield event("response.output_text.delta", **at, delta=text, logprobs=[])
        for index, annotation in enumerate(self._written.reads.response_annotations()):
            name = "response.output_text.annotation.added"
            yield event(name, **at, annotation_index=index, annotation=annotation)
        whole = self.whole()
        yield event("response.output_text.done", **at, text=self._written.text, logprobs=[])
        yield event("response.content_part.done", **at, part=self._part())
        yield event("response.output_item.done", output_index=0, item=self._message(whole["status"]))
        yield event(f"response.{whole['status']}", response=whole)

    def _message(self, status: str) -> Data:
        content = [] if status == "in_progress" else [self._part()]
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _part(self) -> Data:
        is_over = self._written.answer is not None
        annotations = self._written.reads.response_annotations() if is_over else []
        text = self._written.text if is_over else ""
        return {"type": "output_text", "text": text, "annotations": annotations, "logprobs": []}

    def _usage(self) -> Data:
        counts = usage(self._answering, [self._written])
        return {
            "input_tokens": counts["prompt_tokens"],
            "input_tokens_details": counts["prompt_tokens_details"],
            "output_tokens": counts["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": counts["total_tokens"],
        }
