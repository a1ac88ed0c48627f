"""``POST /v1/completions``: text is continued as it is, and memories are searched for by its own words."""

from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.engine import End, Piece, Read
from m3runtime.serve.answering import Answering
from m3runtime.serve.citing import Reads
from m3runtime.serve.errors import ApiError
from m3runtime.serve.events import Data, new_id, now, stream
from m3runtime.serve.fields import Count, PenaltyFields
from m3runtime.serve.served import Served
from m3runtime.serve.writing import TextLogProbs, Written, collect, usage

Text = Annotated[str, Field(min_length=1)]


class CompletionRequest(PenaltyFields):
    """Texts to continue."""

    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=1024)]
    max_tokens: Count | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None


def router(served: Served) -> APIRouter:
    """The route."""
    routes = APIRouter()

    @routes.post("/v1/completions")
    async def completions(request: CompletionRequest, http: Request) -> Response:
        """Continue texts, reading memories."""
        settings = request.penalised(served, request.max_tokens, "max_tokens", request.logprobs)
        memory = request.memory
        restriction = memory.restriction(served, http)
        if memory.as_text:
            raise ApiError(400, "memory.as_text: only in chat completions and responses", param="memory.as_text")
        texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        if len(texts) * request.n > served.limits.choices:
            raise ApiError(400, f"prompt: at most {served.limits.choices} answers here", param="prompt")
        seeds = [settings.seed + number for _ in texts for number in range(request.n)]
        answering = await Answering.begin(
            served,
            http,
            [Prompt(text) for text in texts for _ in range(request.n)],
            [settings.model_copy(update={"seed": seed}) for seed in seeds],
            None if memory.off else restriction,
            memory.refresh,
        )
        written = [Written(Reads(restriction, memory.text), is_message=False) for _ in seeds]
        text = _Text(served, request, answering, written)
        if request.stream:
            return stream(text.chunks())
        await collect(answering, written)
        return JSONResponse(text.completion())

    return routes


class _Text:
    """The objects of one request."""

    def __init__(
        self, served: Served, request: CompletionRequest, answering: Answering, written: Sequence[Written]
    ) -> None:
        self._request = request
        self._answering = answering
        self._written = written
        self._log_probs = [TextLogProbs(served.adapter) for _ in written]
        self._head = {"id": new_id("cmpl"), "object": "text_completion", "created": now(), "model": served.name}

    def completion(self) -> Data:
        """The whole answer."""
        choices = [
            self._choice(index, one.text, one.log_probs, one.finish_reason, **one.reads.told())
            for index, one in enumerate(self._written)
        ]
        return {**self._head, "choices": choices, "usage": usage(self._answering, self._written)}

    async def chunks(self) -> AsyncIterator[Data]:
        """The answer bit by bit."""
        async for index, event in self._answering:
            one = self._written[index]
            before = one.reads.now
            one.take(event)
            choice = None
            if isinstance(event, Read) and (before or one.reads.now):
                choice = self._choice(index, "", memories=one.reads.now)
            elif isinstance(event, Piece) and (event.text or event.log_probs):
                choice = self._choice(index, event.text, event.log_probs)
            elif isinstance(event, End):
                choice = self._choice(index, "", finished=one.finish_reason, **one.reads.verdict())
            if choice is not None:
                yield {**self._head, "choices": [choice]}
        if self._request.stream_options is not None and self._request.stream_options.include_usage:
            yield {**self._head, "choices": [], "usage": usage(self._answering, self._written)}

    def _choice(
        self,
        index: int,
        text: str,
        log_probs: Sequence[Any] = (),
        finished: str | None = None,
        **ours: Any,
    ) -> Data:
        asked = self._request.logprobs is not None and log_probs
        told = self._log_probs[index].told(log_probs) if asked else None
        return {"index": index, "text": text, "logprobs": told, "finish_reason": finished, **ours}
