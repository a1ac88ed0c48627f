"""`Telling`: the scheduler's half tells the HTTP server of vLLM what requests read, and why they are refused.

They are two processes, and what vLLM hands on between them has no room for either before a request ends. So the
scheduler's half listens on a socket of this user, in a folder of this user. Whoever connects is told everything: lines
of JSON. The first is ``{"facts": ...}``. Lines that a listener sends come back in order, after what was told before.
"""

import asyncio
import json
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from threading import Thread
from typing import Any

import xxhash

from m3runtime.errors import ConfigError

_MOST = 16 << 20
"""Bytes that may wait for a listener; then it is cut off, since the scheduler does not wait."""


def socket_of(engine: str) -> Path:
    """The socket of an engine, by its connector's id. Raises `ConfigError` if its folder is another user's."""
    folder = Path(tempfile.gettempdir()) / f"m3-vllm-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if facts.st_uid != os.getuid() or facts.st_mode & 0o077 or folder.is_symlink():
        raise ConfigError(f"{folder} has to be a folder that this user alone may enter; remove it")
    return folder / xxhash.xxh3_64_hexdigest(engine.encode())


class Telling:
    """Listens, in a thread of its own. `tell` may be called from any thread, and returns at once."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        """``facts`` are the same for all requests. Raises `OSError` if there can be no such socket."""
        self._path, self._facts = path, _line({"facts": facts})
        self._writers: set[asyncio.StreamWriter] = set()
        ready: Future[None] = Future()
        self._thread = Thread(target=lambda: asyncio.run(self._listen(ready)), name="m3-vllm-telling", daemon=True)
        self._thread.start()
        ready.result()

    def tell(self, message: Mapping[str, Any]) -> None:
        """Tell it to whoever listens."""
        if self._writers:
            self._loop.call_soon_threadsafe(self._write, _line(message))

    def close(self) -> None:
        """Stop. Closing twice is fine."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._end.set)
            self._thread.join()
            self._path.unlink(missing_ok=True)

    async def _listen(self, ready: "Future[None]") -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        try:
            self._path.unlink(missing_ok=True)
            server = await asyncio.start_unix_server(self._serve, self._path)
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            ready.set_exception(error)
            return
        ready.set_result(None)
        await self._end.wait()
        server.close()
        while self._writers:
            self._writers.pop().close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)  # before it hears anything: it may count on what is told from then on
        writer.write(self._facts)
        try:
            while line := await reader.readline():
                writer.write(line)
        except OSError:
            pass  # a listener that is gone is no fault of ours
        finally:
            self._writers.discard(writer)
            writer.close()

    def _write(self, line: bytes) -> None:
        for writer in list(self._writers):
            writer.write(line)
            if writer.transport.get_write_buffer_size() > _MOST:
                self._writers.discard(writer)
                writer.transport.abort()


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
