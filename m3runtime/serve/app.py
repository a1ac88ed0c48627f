"""`make_app`: the ASGI application of a server."""

from fastapi import FastAPI

from m3runtime.serve import errors
from m3runtime.serve.access import Guard
from m3runtime.serve.served import Served


def make_app(served: Served) -> FastAPI:
    """The application over an open runtime and its model, which stay the caller's to close."""
    app = FastAPI(title="m3runtime", docs_url=None, redoc_url=None)
    errors.install(app)
    for part in ():
        app.include_router(part.router(served))
    app.add_middleware(Guard, served=served)
    return app
