"""``POST /v1/chat/completions``."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from m3runtime.adapters.engine import End, Piece, Read
from m3runtime.serve.answering import Answering
from m3runtime.serve.citing import Reads
from m3runtime.serve.conversation import Messages, prompt_of
from m3runtime.serve.errors import ApiError
from m3runtime.serve.events import Data, new_id, now, stream
from m3runtime.serve.fields import Count, Fields, PenaltyFields
from m3runtime.serve.served import Served
from m3runtime.serve.writing import Written, chat_log_probs, collect, usage


class ResponseFormat(Fields):
    """The field ``response_format``. Only text is supported."""

    type: Literal["text"]


class ChatRequest(PenaltyFields):
    """A conversation to continue."""

    messages: Messages
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    store: Literal[False] = False
    """Answers are not kept."""


def router(served: Served) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def chat_completions(request: ChatRequest, http: Request) -> Response:
        """Answer a conversation from memory."""
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs: only with logprobs", param="top_logprobs")
        param = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        most = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        log_probs = (request.top_logprobs or 0) if request.logprobs else None
        settings = request.penalised(served, most, param, log_probs)
        memory = request.memory
        restriction = memory.restriction(served, http)
        asked = await asyncio.to_thread(prompt_of, served, request.messages, restriction if memory.as_text else None)
        answering = await Answering.begin(
            served,
            http,
            [asked.prompt] * request.n,
            [settings.model_copy(update={"seed": settings.seed + number}) for number in range(request.n)],
            None if memory.off or memory.as_text else restriction,
            memory.refresh,
        )
        written = [Written(Reads(restriction, memory.text)) for _ in range(request.n)]
        if memory.as_text:
            for one in written:
                one.reads.put_in_prompt(asked.references)
        chat = _Chat(served, request, answering, written)
        if request.stream:
            return stream(chat.chunks())
        await collect(answering, written)
        return JSONResponse(chat.completion())

    return routes


class _Chat:
    """The objects of one request."""

    def __init__(self, served: Served, request: ChatRequest, answering: Answering, written: Sequence[Written]) -> None:
        self._served = served
        self._request = request
        self._answering = answering
        self._written = written
        self._head = {"id": new_id("chatcmpl"), "created": now(), "model": served.name}

    def completion(self) -> Data:
        """The whole answer."""
        choices = [
            {
                "index": index,
                "message": {
                    "role": "assistant",
                    "content": one.text,
                    "refusal": None,
                    "annotations": one.reads.url_citations(),
                    **one.reads.told(),
                },
                "logprobs": chat_log_probs(self._served.adapter, one.log_probs) if self._request.logprobs else None,
                "finish_reason": one.finish_reason,
            }
            for index, one in enumerate(self._written)
        ]
        usages = usage(self._answering, self._written)
        return {**self._head, "object": "chat.completion", "choices": choices, "usage": usages}

    async def chunks(self) -> AsyncIterator[Data]:
        """The answer bit by bit. Memories come when they begin to be read, with its end come citations and the verdict.

        An empty list of memories says that none are read any more.
        """
        for index, one in enumerate(self._written):
            yield self._chunk(index, {"role": "assistant", "content": "", **one.reads.in_prompt})
        async for index, event in self._answering:
            one = self._written[index]
            before = one.reads.now
            text = one.take(event)
            if isinstance(event, Read) and (before or one.reads.now):
                yield self._chunk(index, {"memories": one.reads.now})
            elif isinstance(event, Piece) and (text or event.log_probs):
                yield self._chunk(index, {"content": text}, event.log_probs)
            elif isinstance(event, End):
                cited, verdict = one.reads.url_citations(), one.reads.verdict()
                delta = {"annotations": cited, **verdict} if cited else verdict
                yield self._chunk(index, delta, finished=one.finish_reason)
        if self._request.stream_options is not None and self._request.stream_options.include_usage:
            yield {**self._chunk(0, {}), "choices": [], "usage": usage(self._answering, self._written)}

    def _chunk(self, index: int, delta: Data, log_probs: Sequence[Any] = (), finished: str | None = None) -> Data:
        told = chat_log_probs(self._served.adapter, log_probs) if log_probs and self._request.logprobs else None
        choice = {"index": index, "delta": delta, "logprobs": told, "finish_reason": finished}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice]}
