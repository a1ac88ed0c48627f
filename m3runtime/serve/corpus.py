"""``/v1/corpus``: documents are added, listed, searched, read and forgotten, and the bank is verified.

What changes the bank is a job (`m3runtime.serve.jobs`): the answer is 202 with its id. Everything else reads, and
waits for no job.
"""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request
from fastapi import Path as InPath
from fastapi.concurrency import run_in_threadpool
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import UploadFile

from m3runtime.documents.reference import Place, Reference
from m3runtime.retrieval.restriction import Restriction
from m3runtime.serve.access import writer
from m3runtime.serve.changes import Forget, Verify
from m3runtime.serve.errors import ApiError, unsupported
from m3runtime.serve.fields import asked_where
from m3runtime.serve.jobs import Job, Jobs, JobsFullError
from m3runtime.serve.origin import same_site
from m3runtime.serve.served import Served
from m3runtime.serve.uploads import Uploads

Change = [Depends(writer), Depends(same_site)]


class Search(BaseModel):
    """A search for the references nearest to a text."""

    model_config = ConfigDict(extra="forbid")
    query: str = Field(min_length=1, max_length=20_000)
    k: int = Field(5, ge=1, le=100)
    sources: list[Annotated[str, Field(min_length=1, max_length=4096)]] | None = Field(None, max_length=1000)
    """Look only at references that have a place in one of these."""
    where: dict[str, Any] | None = None
    """Look only at references with such metadata: see ``recall.where``."""


class Page(BaseModel):
    """The query of a page of sources. Unknown fields are refused: a misspelled one would tell of all sources."""

    model_config = ConfigDict(extra="forbid")
    after: str = Field("", max_length=4096)
    contains: str = Field("", max_length=200)
    limit: int = Field(100, ge=1, le=1000)


class Forgetting(BaseModel):
    """The query of a source to forget. Unknown fields are refused: a misspelled ``erase`` would leave its bytes."""

    model_config = ConfigDict(extra="forbid")
    source: str = Field(max_length=4096)
    erase: bool = False


_DOCUMENT = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {"file": {"type": "string", "format": "binary"}},
                }
            },
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["name", "text"],
                    "properties": {"name": {"type": "string"}, "text": {"type": "string"}},
                    "additionalProperties": False,
                }
            },
        },
    }
}


def router(served: Served) -> APIRouter:
    """The routes of the corpus."""
    uploads, runtime = Uploads(served.config), served.runtime
    jobs = Jobs(served.config, runtime.refresh)

    @asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        await run_in_threadpool(uploads.clear)
        yield
        await run_in_threadpool(jobs.close)

    routes = APIRouter(prefix="/v1/corpus", tags=["corpus"], lifespan=lifespan)

    def readable(request: Request) -> Restriction:
        """The memories that the key of a request may read, within those of ``recall.where``."""
        restriction: Restriction = request.state.grant.restriction
        return restriction.within(runtime.where)

    def submit(job: Job, change: Any) -> dict[str, Any]:
        if runtime.config.recall.cold_start and job.kind != "verify":
            raise ApiError(409, "recall.cold_start is on: this server writes the bank itself, and nothing else can")
        try:
            return facts(jobs.submit(job, change))
        except JobsFullError as error:
            raise ApiError(429, str(error), code="busy", retry_after=5) from error

    @routes.post("/documents", status_code=202, dependencies=Change, openapi_extra=_DOCUMENT)
    async def add(request: Request) -> dict[str, Any]:
        """Add a document, or replace the one of the same name: a file, or a text with a name."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            async with request.form(max_files=1, max_fields=1) as form:
                if more := form.keys() - {"file"}:
                    raise unsupported(min(more))
                file = form.get("file")
                if not isinstance(file, UploadFile):
                    raise ApiError(400, "the form has no file in its field file", param="file")
                change = await run_in_threadpool(uploads.take, file.filename or "", file.file)
        elif kind == "application/json":
            name, text = _named_text(await request.body())
            change = await run_in_threadpool(uploads.take, name, text.encode())
        else:
            raise ApiError(415, "send a form with a file (multipart/form-data), or JSON with name and text")
        try:
            return submit(Job("add", change.target.name), change)
        except ApiError:
            change.waiting.unlink(missing_ok=True)
            raise

    @routes.get("/jobs")
    def list_jobs() -> dict[str, Any]:
        """All jobs that are known, the newest first."""
        return {"object": "list", "data": [facts(job) for job in jobs.all()]}

    @routes.get("/jobs/{id}")
    def job(id: str) -> dict[str, Any]:
        """A job as it stands now."""
        if (found := jobs.get(id)) is None:
            raise ApiError(404, "there is no such job; ended ones are forgotten after a while")
        return facts(found)

    @routes.get("/sources")
    def sources(request: Request, page: Annotated[Page, Query()]) -> dict[str, Any]:
        """The sources in order of their names, from the one ``after`` a name on."""
        counts, wanted = runtime.bank.home.sources(), page.contains.casefold()
        restriction = readable(request)
        names = sorted(name for name in counts if wanted in name.casefold() and restriction.allows_source(name))
        left = [name for name in names if name > page.after]
        return {
            "object": "list",
            "data": [
                {"object": "corpus.source", "id": name, "references": counts[name], "uploaded": uploads.has(name)}
                for name in left[: page.limit]
            ],
            "has_more": len(left) > page.limit,
            "total": len(names),
        }

    @routes.delete("/sources", status_code=202, dependencies=Change)
    def forget(asked: Annotated[Forgetting, Query()]) -> dict[str, Any]:
        """Forget a source. With ``erase`` no byte of it stays in the bank's files."""
        home, source = runtime.bank.home, asked.source
        if source not in home.sources() and source not in home.states():
            raise ApiError(404, "the bank remembers nothing from this source")
        return submit(Job("forget", source), Forget(source, uploads.folder, asked.erase))

    @routes.post("/search")
    def search(asked: Search, request: Request) -> dict[str, Any]:
        """The references nearest to a text, whatever their scores."""
        restriction = readable(request).within(asked_where(asked.sources, asked.where, "where"))
        (matches,) = runtime.search([asked.query], asked.k, restriction)
        found = runtime.cited(matches)
        data = [
            {"score": round(match.score, 4), **cited(match.id, one, places)}
            for match, one in zip(matches, found, strict=True)
            if one is not None and (places := allowed(one, restriction))
        ]
        return {"object": "list", "data": data}

    @routes.get("/references/{id}")
    def reference(request: Request, id: Annotated[int, InPath(ge=0, lt=1 << 63)]) -> dict[str, Any]:
        """A reference with its text and all its places."""
        (found,) = runtime.references([id])
        places = () if found is None else allowed(found, readable(request))
        if found is None or not places:
            raise ApiError(404, f"nothing is remembered under the id {id}")
        return cited(id, found, places)

    @routes.post("/verify", status_code=202, dependencies=Change)
    def verify() -> dict[str, Any]:
        """Read all of the bank and look for damage. Changes nothing."""
        return submit(Job("verify", ""), Verify())

    return routes


def facts(job: Job) -> dict[str, Any]:
    """A job as the API tells it."""
    kind = "invalid_request_error" if job.is_input_error else "server_error"
    return {
        "object": "corpus.job",
        "id": job.id,
        "kind": job.kind,
        "name": job.name,
        "status": job.state,
        "progress": {"title": job.title, "done": job.done, "total": job.total},
        "result": job.result,
        "error": None if job.error is None else {"message": job.error, "type": kind, "param": None, "code": None},
        "created_at": int(job.created),
    }


def allowed(reference: Reference, restriction: Restriction) -> Sequence[Place]:
    """The places of a reference that may be cited."""
    return [place for place in reference.places if restriction.allows(place)]


def cited(id: int, reference: Reference, places: Sequence[Place]) -> dict[str, Any]:
    """A reference as the API tells it, with some of its places; ``source`` is the name of the first."""
    return {
        "object": "corpus.reference",
        "id": id,
        "source": places[0].name,
        "heading": reference.heading,
        "text": reference.text,
        "tokens": reference.tokens,
        "places": [asdict(place) for place in places],
    }


def _named_text(body: bytes) -> tuple[str, str]:
    """The name and the text of a document in JSON. A name without a suffix is that of a plain text."""
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise ApiError(400, "the body is not JSON", code="invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, "the body must be an object with name and text")
    if more := given.keys() - {"name", "text"}:
        raise unsupported(min(more))
    for field in ("name", "text"):
        value = given.get(field)
        if not isinstance(value, str) or not value.strip():
            raise ApiError(400, f"{field} must be a text that is not blank", param=field)
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ApiError(400, f"{field} has half a character", param=field) from None
    if "\0" in given["text"]:
        raise ApiError(400, "text has a NUL character", param="text")
    name = given["name"].strip()
    return name if "." in name else f"{name}.txt", given["text"]
