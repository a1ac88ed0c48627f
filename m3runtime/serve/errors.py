"""Errors over HTTP, as OpenAI's clients read them: ``{"error": {message, type, param, code}}``.

No message has the text of a reference, or a path of the server.
"""

import logging
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from m3runtime.errors import EngineClosedError, InputError, M3Error, PromptTooLongError, RemoteError, StoreFullError

log = logging.getLogger("m3runtime.serve")

_KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_LONGEST = 300
_BRANCH = re.compile(r"(function|union|constrained)-|union$|list\[|str$")
"""Parts of a place that are no field of the request: pydantic's names of a union's branches."""


class ErrorFacts(BaseModel):
    """An error, as OpenAI's clients read it."""

    message: str
    type: str
    param: str | None
    """The field that is at fault."""
    code: str | None


class ErrorBody(BaseModel):
    """The body of every response that is an error."""

    error: ErrorFacts


RESPONSES: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is refused."},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer now, or failed to."},
}
"""The errors of all routes, for their description."""


class ApiError(HTTPException):
    """A request that is refused, with its HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """``kind`` is the field ``type`` of the error; ``retry_after`` is in seconds."""
        headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
        if retry_after is not None:
            headers["Retry-After"] = str(retry_after)
        super().__init__(status, message, headers)
        self.param = param
        self.code = code
        self.kind = kind or _KINDS.get(status, "server_error" if status >= 500 else "invalid_request_error")

    @property
    def body(self) -> dict[str, Any]:
        """The error object."""
        return {"error": {"message": self.detail, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response."""
        return JSONResponse(self.body, self.status_code, self.headers)


def as_api_error(error: Exception) -> ApiError:
    """An error of the runtime or the engine, as a client may see it. What is not the client's fault is logged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        code = "context_length_exceeded" if isinstance(error, PromptTooLongError) else None
        return ApiError(400, str(error)[:_LONGEST], code=code)
    if isinstance(error, EngineClosedError):
        return ApiError(503, "the server is being stopped", code="shutting_down", retry_after=5)
    if isinstance(error, StoreFullError):
        return ApiError(503, "memories of other answers take all room; try again later", code="busy", retry_after=1)
    if isinstance(error, RemoteError):
        log.error("the engine failed: %s", error)
        return ApiError(
            502, "the engine behind this server failed; try again later", code="engine_failed", retry_after=5
        )
    log.error("a request failed: %s", error if isinstance(error, M3Error) else type(error).__name__, exc_info=error)
    return ApiError(500, "the server failed to answer; its log says why", code=type(error).__name__)


def refused(details: Sequence[dict[str, Any]]) -> ApiError:
    """The first error of validation: an unknown field before a wrong value."""
    first = min(details, key=lambda one: one["type"] != "extra_forbidden")
    param = ".".join(str(part) for part in first["loc"][1:] if not _BRANCH.match(str(part)))
    if first["type"] == "extra_forbidden":
        return unsupported(param)
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON", code="invalid_json")
    if first["type"] == "model_attributes_type" and not param:  # curl sends a form unless it is told otherwise
        message = "the body is not an object of JSON with Content-Type: application/json"
        return ApiError(400, message, code="invalid_value")
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param or 'the body'}: {message}"[:_LONGEST], param=param or None, code="invalid_value")


def unsupported(field: str) -> ApiError:
    """The refusal of a field that the API does not have."""
    return ApiError(400, f"{field[:80]} is not supported", param=field[:80], code="unsupported_parameter")


def install(app: FastAPI) -> None:
    """Answer every error with an error object."""

    async def known(_: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response()

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return refused(error.errors()).response()

    async def by_status(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        if isinstance(error, ApiError):
            return error.response()
        answer = ApiError(error.status_code, str(error.detail)).response()
        answer.headers.update(error.headers or {})
        return answer

    app.add_exception_handler(M3Error, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, by_status)
