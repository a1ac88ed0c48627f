"""`Hearing`: what a server of vLLM hears of its requests from `m3model.vllm.telling`."""

import asyncio
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self
from uuid import uuid4

_NAME = re.compile(r"(?:(\d+)_)?.*(m3-[0-9a-f]{32})(?:-(\d+))?(?:-[^-]*-beam-\d+)?-[^-]*")
"""vLLM's name of a request with a mark: number of its answer, mark, number of its prompt, beam, and a suffix."""


def new_mark() -> str:
    """A mark that no other request has, to be a part of vLLM's name of one."""
    return f"m3-{uuid4().hex}"


@dataclass(slots=True)
class Told:
    """What was told of one HTTP request, and nobody has taken yet."""

    reads: list[dict[str, Any]] = field(default_factory=list)
    """What is read: ``tokens`` before it, ``memories``, and of several answers their ``prompt`` and ``answer``."""
    error: str | None = None
    """Why it is refused."""
    status: int = 500

    def take(self) -> list[dict[str, Any]]:
        """The reads since the last call."""
        reads, self.reads = self.reads, []
        return reads


class Hearing:
    """A connection to the scheduler's half. Of one event loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, facts: dict[str, Any]) -> None:
        self.facts = facts
        """What is the same for all requests: see `m3model.vllm.connector`."""
        self._reader, self._writer = reader, writer
        self._told: dict[str, Told] = {}
        self._syncs: dict[str, asyncio.Event] = {}
        self._task = asyncio.get_running_loop().create_task(self._hear())

    @classmethod
    async def open(cls, path: Path) -> Self:
        """Connect. Raises `OSError` if nobody is there."""
        reader, writer = await asyncio.open_unix_connection(path, limit=1 << 24)
        return cls(reader, writer, json.loads(await reader.readline())["facts"])

    @property
    def is_open(self) -> bool:
        """Is the scheduler's half still there?"""
        return not self._task.done()

    @contextmanager
    def about(self, mark: str) -> Iterator[Told]:
        """Collects what is told of a request."""
        told = self._told[mark] = Told()
        try:
            yield told
        finally:
            del self._told[mark]

    async def sync(self) -> None:
        """Wait until all has been heard that was told before."""
        if not self.is_open:
            return
        name = uuid4().hex
        heard = self._syncs[name] = asyncio.Event()
        self._writer.write(json.dumps({"sync": name}).encode() + b"\n")
        await heard.wait()

    async def close(self) -> None:
        """End the connection."""
        self._writer.close()
        await asyncio.wait([self._task])

    async def _hear(self) -> None:
        try:
            while line := await self._reader.readline():
                message = json.loads(line)
                if "sync" in message:
                    self._syncs.pop(message["sync"]).set()
                elif (name := _NAME.fullmatch(message["request"])) and (told := self._told.get(name[2])) is not None:
                    _add(told, message, prompt=int(name[3] or 0), answer=int(name[1] or 0))
        finally:
            for one in self._syncs.values():
                one.set()
            self._writer.close()


def _add(told: Told, message: dict[str, Any], *, prompt: int, answer: int) -> None:
    if "error" in message:
        told.error, told.status = message["error"], message["status"]
    else:
        told.reads.append({**message["read"], "prompt": prompt, "answer": answer})
