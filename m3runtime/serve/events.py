"""Server-sent events, and the identifiers and times of answers."""

import json
import secrets
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse

from m3runtime.serve.errors import as_api_error

Data = dict[str, Any]


def stream(events: AsyncIterator[Data | tuple[str, Data]], *, done: bool = True) -> StreamingResponse:
    """A response of server-sent events: data alone, or with a name. After an error comes its error object.

    ``done``: send ``[DONE]`` at the end, as completions do.
    """
    return StreamingResponse(
        _written(events, done=done), media_type="text/event-stream", headers={"Cache-Control": "no-store"}
    )


async def _written(events: AsyncIterator[Data | tuple[str, Data]], *, done: bool) -> AsyncIterator[str]:
    sent = 0
    try:
        async for event in events:
            sent += 1
            name, data = event if isinstance(event, tuple) else ("", event)
            yield (f"event: {name}\n" if name else "") + f"data: {compact(data)}\n\n"
    except Exception as error:  # noqa: BLE001 - told to the client, and logged if it is not the client's fault
        told = as_api_error(error).body
        if done:
            yield f"data: {compact(told)}\n\n"
        else:  # OpenAI's clients know the event by its type, and raise what stands in ``error``
            facts = {**told["error"], "type": "error", "sequence_number": sent, **told}
            yield f"event: error\ndata: {compact(facts)}\n\n"
        return
    if done:
        yield "data: [DONE]\n\n"


def compact(data: Data) -> str:
    """JSON in one line."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def new_id(kind: str) -> str:
    """An identifier such as ``chatcmpl-4f...``."""
    return f"{kind}-{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
