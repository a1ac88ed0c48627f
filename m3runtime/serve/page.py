"""``/``: the page that shows memory at work. Its files are in ``assets/``, and it asks no other site for anything."""

from hashlib import blake2b
from importlib.resources import files

from fastapi import APIRouter, Request
from fastapi.responses import Response

from m3runtime.serve.errors import ApiError
from m3runtime.serve.served import Served

_TYPES = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}


def router(_: Served) -> APIRouter:
    """The routes of the page and its files, which need no key: they show nothing of the bank."""
    assets = {
        one.name: (one.read_bytes(), _TYPES[one.name.rpartition(".")[2]])
        for one in files("m3runtime.serve").joinpath("assets").iterdir()
        if one.name.rpartition(".")[2] in _TYPES
    }
    routes = APIRouter(include_in_schema=False)

    def file(name: str, request: Request) -> Response:
        if name not in assets:
            raise ApiError(404, "there is no such file")
        content, kind = assets[name]
        tag = f'"{blake2b(content, digest_size=8).hexdigest()}"'
        headers = {**_HEADERS, "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    @routes.get("/")
    def index(request: Request) -> Response:
        return file("index.html", request)

    @routes.get("/assets/{name}")
    def asset(name: str, request: Request) -> Response:
        return file(name, request)

    @routes.get("/favicon.ico")
    def icon(request: Request) -> Response:
        return file("icon.svg", request)

    return routes
