"""Where a request comes from: pages of other sites must not reach a server through its user's browser."""

import ipaddress
from urllib.parse import urlsplit

from fastapi import Request

from m3runtime.serve.errors import ApiError


def is_own(host: str) -> bool:
    """Is this an address, or the name, of this machine that no other machine can reach?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_host(host: str, address: str) -> None:
    """Raise `ApiError` 403 if a server that listens at its own machine's ``address`` is called by another name.

    Without keys, a page of another site could have its own name lead to 127.0.0.1, and read and change the bank.
    """
    if is_own(address) and not is_own((_host(f"//{host}") or "").lower()):
        raise ApiError(403, "without keys this server answers only as localhost or 127.0.0.1", code="foreign_host")


def same_site(request: Request) -> None:
    """A dependency of routes that change the bank. Raises `ApiError` 403 for a request that another site's page made.

    A server on 127.0.0.1 without keys can be reached by every page that its user visits.
    """
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site", "same-origin")
    foreign = origin not in (None, f"http://{request.headers.get('host')}", f"https://{request.headers.get('host')}")
    if foreign or site not in ("same-origin", "none"):
        raise ApiError(403, "the page of another site may not change this bank", code="cross_site")


def _host(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None
