"""``GET /v1/models``: the model, and the embedder of the bank."""

from fastapi import APIRouter

from m3runtime.serve.errors import ApiError
from m3runtime.serve.events import Data, now
from m3runtime.serve.served import Served


def router(served: Served) -> APIRouter:
    """The routes."""
    routes = APIRouter()
    began = now()
    listed = {
        name: {"id": name, "object": "model", "created": began, "owned_by": "m3runtime"}
        for name in (served.name, served.embedder_name)
    }

    @routes.get("/v1/models")
    async def models() -> Data:
        """List them."""
        return {"object": "list", "data": list(listed.values())}

    @routes.get("/v1/models/{name}")
    async def model(name: str) -> Data:
        """One of them."""
        if name not in listed:
            raise ApiError(404, f"no such model here; {served.name!r} is", param="model", code="model_not_found")
        return listed[name]

    return routes
