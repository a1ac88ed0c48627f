"""``POST /v1/embeddings``: the bank's embedder."""

import asyncio
import base64
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from m3runtime.retrieval.embedder import Embeddings
from m3runtime.serve.errors import ApiError
from m3runtime.serve.fields import Fields
from m3runtime.serve.served import Served

Text = Annotated[str, Field(min_length=1)]
_AT_ONCE = 16
"""Texts that are embedded before the questions of answers have their turn."""


class EmbeddingRequest(Fields):
    """Texts to embed."""

    model: str
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None
    input_type: Literal["query", "document"] = "query"
    """Embedders may turn questions and documents into vectors differently. The field is ours."""
    user: Annotated[str, Field(max_length=512)] | None = None


def router(served: Served) -> APIRouter:
    """The route."""
    routes = APIRouter()
    embedder = served.runtime.retriever.embedder
    turn = asyncio.Lock()
    """One request at a time: answers need the embedder and threads, too."""

    @routes.post("/v1/embeddings")
    async def embeddings(request: EmbeddingRequest, http: Request) -> Response:
        """Embed texts by the embedder that recalls search with."""
        if request.model not in (served.name, served.embedder_name):
            message = f"{request.model!r} is not served here; {served.embedder_name!r} is"
            raise ApiError(404, message[:300], param="model", code="model_not_found")
        if request.dimensions not in (None, embedder.dim):
            raise ApiError(400, f"dimensions: this embedder has {embedder.dim}", param="dimensions")
        texts = [request.input] if isinstance(request.input, str) else request.input
        if not all(text.strip() for text in texts):
            raise ApiError(400, "input: a text is blank", param="input")
        served.gate.take(1)
        try:
            async with asyncio.timeout(served.limits.timeout), turn:
                vectors, tokens = await embed_all(texts, request.input_type, http)
        except TimeoutError:
            raise ApiError(504, "the request took too long", code="timeout") from None
        finally:
            served.gate.give_back()
        data = [
            {"object": "embedding", "index": index, "embedding": _encoded(vector, request.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JSONResponse({"object": "list", "data": data, "model": served.embedder_name, "usage": usage})

    async def embed_all(texts: list[str], kind: str, http: Request) -> tuple[Embeddings, int]:
        """The vectors of all texts, and their tokens. Ends early if the client goes."""
        done: list[tuple[Embeddings, int]] = []
        for start in range(0, len(texts), _AT_ONCE):
            if await http.is_disconnected():
                raise ApiError(400, "the client has gone", code="gone")
            done.append(await asyncio.to_thread(embed, texts[start : start + _AT_ONCE], kind))
        return np.concatenate([vectors for vectors, _ in done]), sum(tokens for _, tokens in done)

    def embed(texts: list[str], kind: str) -> tuple[Embeddings, int]:
        turn = embedder.embed_queries if kind == "query" else embedder.embed_references
        # The embedder's own tokens are not known; these are the model's.
        return turn(texts), sum(map(served.adapter.count_tokens, texts))

    return routes


def _encoded(vector: Embeddings, form: str) -> list[float] | str:
    if form == "float":
        return [float(value) for value in vector]
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
