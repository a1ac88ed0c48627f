"""`Memories`: middleware for the HTTP server of vLLM, ``--middleware m3model.vllm.middleware.Memories``.

vLLM answers a request that cannot be served with 500 and no reason, and its streams do not say what was read. With
it refusals are errors as OpenAI's clients know them, parts of streams have ``kv_transfer_params`` as whole answers do,
and ``GET /v1/m3`` tells how prompts begin.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from m3model.vllm.hearing import Hearing, Told, new_mark
from m3model.vllm.telling import socket_of

log = logging.getLogger("m3model.vllm")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

_FACTS = "/v1/m3"
_HEADER = b"x-request-id"
"""What a client says in it is a part of vLLM's name of the request."""


class Memories:
    """The middleware, of the ASGI. It says nothing about requests of other connectors, or without memories."""

    def __init__(self, app: App) -> None:
        self._app = app
        self._hearing: Hearing | None = None
        self._opening = asyncio.Lock()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """See the ASGI."""
        asks = scope["type"] == "http" and (scope["method"] == "POST" or scope["path"] == _FACTS)
        hearing = await self._open(scope) if asks else None
        if hearing is None:
            await self._app(scope, receive, send)
        elif scope["path"] == _FACTS:
            await self._app(scope, receive, _Facts(hearing.facts, send))
        else:
            mark = new_mark()
            told = [value + b"-" for name, value in scope["headers"] if name == _HEADER]
            headers = [(name, value) for name, value in scope["headers"] if name != _HEADER]
            headers.append((_HEADER, b"".join(told[:1]) + mark.encode()))
            with hearing.about(mark) as heard:
                await self._app({**scope, "headers": headers}, receive, _Answer(hearing, heard, send))

    async def _open(self, scope: Message) -> Hearing | None:
        async with self._opening:
            if self._hearing is None or not self._hearing.is_open:
                config = scope["app"].state.engine_client.vllm_config.kv_transfer_config
                try:
                    self._hearing = await Hearing.open(socket_of(config.engine_id))
                except (AttributeError, OSError) as error:
                    log.warning("no MemoryConnector tells what requests read: %s", error)
                    self._hearing = None
            return self._hearing


class _Facts:
    """Tells facts where the application has nothing: it has let the request pass, keys included."""

    def __init__(self, facts: dict[str, Any], send: Send) -> None:
        self._facts, self._send = facts, send
        self._is_ours = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start" and message["status"] == 404:
            self._is_ours = True
            await _respond(self._send, 200, self._facts)
        elif not self._is_ours:
            await self._send(message)


class _Answer:
    """What vLLM sends of one answer, with what was told of it."""

    def __init__(self, hearing: Hearing, told: Told, send: Send) -> None:
        self._hearing, self._told, self._send = hearing, told, send
        self._is_stream = False
        self._held: list[Message] | None = None
        self._last: dict[str, Any] = {}

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self._is_stream = any(
                name == b"content-type" and value.startswith(b"text/event-stream") for name, value in message["headers"]
            )
            if message["status"] >= 500:
                self._held = []
        if self._held is not None:
            self._held.append(message)
            if message["type"] == "http.response.body" and not message.get("more_body"):
                await self._refuse(self._held)
        elif self._is_stream and message["type"] == "http.response.body":
            events = message.get("body", b"").split(b"\n\n")
            body = b"\n\n".join([await self._event(one) if one else b"" for one in events])
            await self._send({**message, "body": body})
        else:
            await self._send(message)

    async def _refuse(self, held: list[Message]) -> None:
        await self._hearing.sync()
        if self._told.error is not None:
            await _respond(self._send, self._told.status, _error(self._told))
            return
        for message in held:
            await self._send(message)

    async def _event(self, event: bytes) -> bytes:
        """A server-sent event, with what was read since the last one."""
        if event == b"data: [DONE]":
            await self._hearing.sync()
            if reads := self._told.take():
                return _data({**self._last, "choices": [], **_reads(reads)}) + b"\n\n" + event
            return event
        if event.startswith(b'data: {"error"'):
            await self._hearing.sync()
            return event if self._told.error is None else _data(_error(self._told))
        if not self._told.reads or not event.startswith(b"data: {"):
            return event
        part = json.loads(event.removeprefix(b"data: "))
        self._last = {name: part[name] for name in ("id", "object", "created", "model") if name in part}
        return _data({**part, **_reads(self._told.take())})


def _reads(reads: list[dict[str, Any]]) -> dict[str, Any]:
    return {"kv_transfer_params": {"m3": {"reads": reads}}}


def _error(told: Told) -> dict[str, Any]:
    kind = "BadRequestError" if told.status < 500 else "InternalServerError"
    return {"error": {"message": told.error, "type": kind, "param": "kv_transfer_params", "code": told.status}}


def _data(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode()


async def _respond(send: Send, status: int, body: dict[str, Any]) -> None:
    data = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": data})
