"""`make_app`: the ASGI application of a server."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import Depends, FastAPI

from m3runtime.serve import (
    chat,
    completions,
    corpus,
    embeddings,
    errors,
    health,
    models,
    observing,
    page,
    responses,
)
from m3runtime.serve.access import Guard
from m3runtime.serve.fields import check_query
from m3runtime.serve.logs import Trace
from m3runtime.serve.served import Served


def make_app(served: Served) -> FastAPI:
    """The application over an open runtime and its model, which stay the caller's to close.

    When it ends it closes the model's engine, so that no event comes any more.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        served.gate.is_closing = True
        for cancel in list(served.running):
            cancel("stopped")
        await asyncio.to_thread(served.adapter.engine.close)

    app = FastAPI(
        title="m3runtime",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses=errors.RESPONSES,
        dependencies=[Depends(check_query)],
    )
    errors.install(app)
    for part in (models, chat, completions, responses, embeddings, health, corpus, observing, page):
        app.include_router(part.router(served))
    app.add_middleware(Guard, served=served)
    app.add_middleware(Trace, served=served)
    return app
