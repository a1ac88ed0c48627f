"""`Server`: listens on a port and serves an application until it is stopped."""

import logging
import signal
import socket
from types import FrameType

import uvicorn

from m3runtime.config.serve import ServeConfig
from m3runtime.errors import ConfigError
from m3runtime.serve.app import make_app
from m3runtime.serve.origin import is_own
from m3runtime.serve.served import Served

log = logging.getLogger("m3runtime.serve")

_HEADERS = 64 << 10
"""Most bytes of a request's line and headers."""
_IDLE_S = 30
"""Seconds that a connection is kept without a request."""


def check_address(limits: ServeConfig, *, has_keys: bool, without_keys: bool) -> None:
    """Raise `ConfigError` unless the address is this machine's own, there are keys, or ``without_keys`` is wanted."""
    if has_keys or without_keys or is_own(limits.address):
        return
    raise ConfigError(
        f"serve.address: {limits.address} can be reached from other machines, and there are no keys; set M3_KEYS or "
        "serve.keys_file, or say --no-keys"
    )


class Server(uvicorn.Server):
    """Serves until SIGINT or SIGTERM: then it takes no more requests and lets running answers end.

    Answers that need longer than ``serve.grace`` are cancelled.
    """

    def __init__(self, served: Served) -> None:
        """Listen at once, so that requests that come before `run` wait. Raises `ConfigError` if that cannot be."""
        self.served = served
        limits = served.limits
        self.socket = _listen(limits.address, limits.port)
        self.port: int = self.socket.getsockname()[1]
        super().__init__(
            uvicorn.Config(
                make_app(served),
                log_config=None,
                access_log=False,
                server_header=False,
                lifespan="on",
                timeout_keep_alive=_IDLE_S,
                timeout_graceful_shutdown=max(1, round(limits.grace)),
                h11_max_incomplete_event_size=_HEADERS,
                http="h11",
                ws="none",
            )
        )

    def serve_until_stopped(self) -> None:
        """Serve. Returns after a signal, or after ``should_exit`` was set, once all answers have ended."""
        log.info("listening", extra={"fields": {"address": self.served.limits.address, "port": self.port}})
        self.run([self.socket])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002
        """Stop at a signal; a second SIGINT waits for nothing.

        Unlike uvicorn, the signal is not raised again afterwards: the caller still has to close bank and model.
        """
        self.force_exit = self.should_exit and sig == signal.SIGINT
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take nothing new, and wait for what is under way."""
        self.served.gate.is_closing = True
        log.info("stopping", extra={"fields": {"answers": self.served.gate.taken}})
        await super().shutdown(sockets)


def _listen(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=1024)
    except (OSError, UnicodeError) as error:
        why = getattr(error, "strerror", None) or "no such address"
        raise ConfigError(f"serve.port: cannot listen at {address}:{port}: {why}") from None
