"""`same_site`: keeps other sites' pages from changing the bank through a reader's browser."""

from urllib.parse import urlsplit

from fastapi import Request

from m3runtime.serve.errors import ApiError


def same_site(request: Request) -> None:
    """A dependency of routes that change the bank. Raises `ApiError` 403 for a request that another site's page made.

    A server on 127.0.0.1 without keys can be reached by every page that its user visits.
    """
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site", "same-origin")
    foreign = origin is not None and urlsplit(origin).netloc != request.headers.get("host")
    if foreign or site not in ("same-origin", "none"):
        raise ApiError(403, "the page of another site may not change this bank", code="cross_site")
