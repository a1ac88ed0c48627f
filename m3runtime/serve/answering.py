"""`Answering`: the answers of one HTTP request, from the engine's thread to the event loop."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress

from starlette.requests import Request as HttpRequest

from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.condensing import condensed
from m3runtime.adapters.engine import End, Event, Failure, Piece, Request, Ticket
from m3runtime.config.schema import GenerateConfig
from m3runtime.retrieval.restriction import Restriction
from m3runtime.serve.errors import ApiError
from m3runtime.serve.served import Reason, Served


class Answering:
    """Answers under way. Of the event loop's thread, but for what it hands to the engine.

    Each answer holds a place of the gate and a stream until its last event, whoever waits for it: a client that goes,
    or a request that takes too long, cancels the answers, and their last events come all the same.
    """

    def __init__(self, served: Served, http: HttpRequest, prompts: Sequence[Prompt]) -> None:
        self.prompts = prompts
        self.prompt_tokens = 0
        """Tokens of all prompts, without memories."""
        self.reason: Reason | None = None
        """Why it was cancelled, if it was."""
        self._served = served
        self._http = http
        self._loop = asyncio.get_running_loop()
        self._events = asyncio.Queue[tuple[int, Event]]()
        self._tickets: Sequence[Ticket] = ()
        self._requests: list[Request] = []
        self._open: set[int] = set()
        self._last = [0.0] * len(prompts)
        self._has_begun = [False] * len(prompts)
        self._watch: asyncio.Task[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None

    @classmethod
    async def begin(
        cls,
        served: Served,
        http: HttpRequest,
        prompts: Sequence[Prompt],
        settings: Sequence[GenerateConfig],
        restriction: Restriction | None,
        recall_every: int = 1,
    ) -> "Answering":
        """Submit prompts, each with its settings; without ``restriction`` they read no memories.

        ``recall_every`` is as in `Request`.

        Raises `ApiError` if there is no room for them, and `InputError` for one that can never be answered.
        """
        answering = cls(served, http, prompts)
        served.gate.take(len(prompts))
        answering._open = set(range(len(prompts)))
        submitting = asyncio.to_thread(answering._submit, settings, restriction, recall_every)
        submission = asyncio.ensure_future(submitting)
        submission.add_done_callback(answering._submitted)
        await asyncio.shield(submission)  # whoever waits for it may be cancelled; what it took is given back later
        return answering

    def __aiter__(self) -> AsyncIterator[tuple[int, Event]]:
        """The number of the prompt and an event, until all have ended. Raises `ApiError` 504 after a timeout."""
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[tuple[int, Event]]:
        left = len(self.prompts)
        try:
            while left:
                index, event = await self._events.get()
                left -= isinstance(event, End | Failure)
                if self.reason == "timeout":
                    raise ApiError(504, "the request took too long", code="timeout")
                if self.reason == "stopped":
                    raise ApiError(503, "the server is being stopped", code="shutting_down", retry_after=5)
                yield index, event
        finally:
            if left:
                self.cancel("gone")

    def cancel(self, reason: Reason) -> None:
        """End all answers. Their rows are free after the step under way."""
        self.reason = self.reason or reason
        for ticket in self._tickets:
            ticket.cancel()

    # -- submission ---------------------------------------------------------------------------------------------

    def _submit(
        self, settings: Sequence[GenerateConfig], restriction: Restriction | None, recall_every: int
    ) -> Sequence[Ticket]:
        """In a thread: reading the prompts takes a while."""
        served = self._served
        for prompt in dict.fromkeys(self.prompts):
            count = served.adapter.count_prompt(prompt, memories=restriction is not None)
            self.prompt_tokens += count
            served.meter.count_tokens(prompt=count)
            limit = served.limits.prompt_tokens
            if limit is not None and count > limit:
                raise ApiError(
                    400,
                    f"the prompt has {count} tokens, and at most {limit} are allowed",
                    code="context_length_exceeded",
                )
        if restriction is not None and served.config.recall.condense:
            self.prompts = condensed(served.adapter, self.prompts)
        for prompt, one in zip(self.prompts, settings, strict=True):
            stream = None if restriction is None else served.runtime.stream(served.adapter.dtype, restriction)
            self._requests.append(Request(prompt, one, stream, recall_every))
        began = time.perf_counter()
        self._last = [began] * len(self.prompts)
        return served.adapter.engine.submit(self._requests, self._hear)

    def _submitted(self, submission: "asyncio.Future[Sequence[Ticket]]") -> None:
        if submission.exception() is not None:
            for index in list(self._open):
                self._close(index)
            return
        self._tickets = submission.result()
        if self.reason is not None:
            self.cancel(self.reason)
        elif self._open:
            self._served.running.add(self.cancel)
            self._watch = self._loop.create_task(self._look_for_the_client())
            self._alarm = self._loop.call_later(self._served.limits.timeout, self.cancel, "timeout")

    async def _look_for_the_client(self) -> None:
        while (await self._http.receive())["type"] != "http.disconnect":
            pass
        self.cancel("gone")

    # -- events -------------------------------------------------------------------------------------------------

    def _hear(self, index: int, event: Event) -> None:
        """In the engine's thread."""
        now = time.perf_counter()
        if isinstance(event, Piece) and event.tokens:
            meter = self._served.meter
            (meter.between_tokens if self._has_begun[index] else meter.first_token).add(now - self._last[index])
            self._has_begun[index], self._last[index] = True, now
        with suppress(RuntimeError):  # the loop is closed after a second Ctrl-C: nobody waits any more
            self._loop.call_soon_threadsafe(self._take, index, event)

    def _take(self, index: int, event: Event) -> None:
        if isinstance(event, End | Failure):
            self._close(index)
            meter = self._served.meter
            if isinstance(event, End):
                meter.count_answer(event.answer.stopped_by)
                meter.count_tokens(answer=len(event.answer.tokens))
            else:
                meter.count_answer("failed")
        self._events.put_nowait((index, event))

    def _close(self, index: int) -> None:
        """Give back what an answer held."""
        self._open.discard(index)
        self._served.gate.give_back()
        if index < len(self._requests) and (stream := self._requests[index].stream) is not None:
            stream.close()
        if not self._open:
            self._served.running.discard(self.cancel)
            if self._watch is not None:
                self._watch.cancel()
            if self._alarm is not None:
                self._alarm.cancel()
