"""`Guard`: checks key and size of a request before anything reads its body. `writer`: the routes that change a bank.

A pure ASGI middleware, so that a stream sees its client go.
"""

import asyncio

from fastapi import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from m3runtime.serve.errors import ApiError
from m3runtime.serve.keys import Grant
from m3runtime.serve.origin import check_host
from m3runtime.serve.served import Served

OPEN = frozenset({"/", "/favicon.ico", "/health", "/health/live", "/health/ready"})
"""Paths that need no key: the page itself shows nothing of the bank."""
OPEN_FOLDER = "/assets/"
"""Files of the page."""
RESTRICTED = (
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/models",
    "/v1/corpus/search",
    "/v1/corpus/references/",
    "/v1/corpus/sources",
)
"""Beginnings of the paths that a key for some sources may use: these routes keep to its sources."""
DOCUMENTS = "/v1/corpus/documents"
"""The path that takes forms with a file, which may be larger than other bodies."""
_UPLOAD = b"multipart/form-data"


class Guard:
    """Answers 401 without a valid key, and 413 for a body above the limit, declared or not."""

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self._app = app
        self._served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check, and hand on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        try:
            scope.setdefault("state", {})["grant"] = self._grant(scope["path"], headers)
            limit, declared = self._limit(scope["path"], headers), headers.get(b"content-length")
            limited = _Limited(receive, limit, declared, self._served.limits.timeout)
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, limited, send)

    def _grant(self, path: str, headers: dict[bytes, bytes]) -> Grant:
        keys = self._served.keys
        if not keys.needed:
            check_host(headers.get(b"host", b"").decode("latin-1"), self._served.limits.address)
            return Grant("write")
        if path in OPEN or path.startswith(OPEN_FOLDER):
            return Grant("none")
        kind, _, key = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        grant = keys.grant(key.strip()) if kind.lower() == "bearer" else None
        if grant is None:
            raise ApiError(401, "a valid key is needed: Authorization: Bearer KEY", code="invalid_api_key")
        if grant.restriction.where and not path.startswith(RESTRICTED):
            raise ApiError(403, "this key may only ask, and read its sources", code="key_is_restricted")
        return grant

    def _limit(self, path: str, headers: dict[bytes, bytes]) -> int:
        limits = self._served.limits
        is_upload = path == DOCUMENTS and headers.get(b"content-type", b"").lower().startswith(_UPLOAD)
        return max(limits.body, limits.upload) if is_upload else limits.body


class _Limited:
    """Receives a body of at most so many bytes, in at most so many seconds."""

    def __init__(self, receive: Receive, limit: int, declared: bytes | None, seconds: float) -> None:
        self._receive = receive
        self._deadline: float | None = asyncio.get_running_loop().time() + seconds
        self._left = self._limit = limit
        if declared is not None and declared.isdigit() and int(declared) > limit:
            raise self._too_large()

    async def __call__(self) -> Message:
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise ApiError(408, "the request took too long to arrive", code="timeout") from None
        if message["type"] == "http.request":
            if not message.get("more_body", False):
                self._deadline = None
            self._left -= len(message.get("body", b""))
            if self._left < 0:
                raise self._too_large()
        return message

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a request may have at most {self._limit} bytes here", code="request_too_large")


def writer(request: Request) -> None:
    """A dependency of routes that change the bank. Raises `ApiError` 403 for a key that may only read."""
    if request.state.grant.access != "write":
        raise ApiError(403, "this key may only read; a write key is needed", code="write_key_needed")
