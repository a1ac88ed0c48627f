"""Structured logs: each line is one object of JSON. `Trace` gives every request an id and a line, and answers HEAD.

A line has no query string, header or body, so no key and no text of a user or of a document.
"""

import json
import logging
import re
import secrets
import sys
import time
from datetime import UTC, datetime
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from m3runtime.serve.errors import as_api_error
from m3runtime.serve.served import Served

log = logging.getLogger("m3runtime.serve")

_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)


class Lines(logging.Formatter):
    """Formats records as lines of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, with the fields that the record was given as ``extra={"fields": ...}``."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=True)


def configure(level: int = logging.INFO) -> None:
    """Send the logs of this package and of uvicorn to standard error, as lines of JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    for name in ("m3runtime", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level if name == "m3runtime" else logging.WARNING)


class Trace:
    """Gives each request an id, ``X-Request-Id`` or a new one, which the response repeats; logs and counts it."""

    def __init__(self, app: ASGIApp, served: Served) -> None:
        self._app = app
        self._meter = served.meter

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on, and look at the response."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        method = scope["method"]
        if method == "HEAD":  # answered as GET is; uvicorn, whose own scope stays as it is, leaves the body out
            scope = {**scope, "method": "GET"}
        id = given if _ID.fullmatch(given) else f"req-{secrets.token_hex(8)}"
        scope.setdefault("state", {})["request_id"] = id
        began, status = time.perf_counter(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", id.encode())]}
            await send(message)

        try:
            await self._app(scope, receive, sending)
        except Exception as error:  # noqa: BLE001 - logged and told; uvicorn would log it again
            told = as_api_error(error)
            if not status:
                await told.response()(scope, receive, sending)
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._meter.count_request(route, status)
            fields = {
                "request_id": id,
                "method": method,
                "route": route,
                "status": status,
                "seconds": round(time.perf_counter() - began, 4),
            }
            log.info("request", extra={"fields": fields})
