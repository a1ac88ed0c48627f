"""`RemoteCore`: runs requests on a server of vLLM, in an event loop in a thread of its own."""

import asyncio
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any

import httpx

from m3model.engine.job import Job
from m3model.remote.server import VllmServer
from m3model.vllm.engine import Core, sampling
from m3model.vllm.wish import Head
from m3runtime.adapters.engine import Read
from m3runtime.config.where import as_mappings
from m3runtime.errors import EngineClosedError
from m3runtime.recall.recalled import Recalled
from m3runtime.runtime import Runtime

Ended = Callable[[Job], None]


class RemoteCore(Core):
    """The server recalls: streams of requests only say what they may read. The events' records have no log weights."""

    def __init__(self, server: VllmServer, runtime: Runtime) -> None:
        self._server, self._runtime = server, runtime
        self._lock = threading.Lock()
        self._closed = False
        self._tasks: dict[Job, asyncio.Task[None]] = {}  # the loop's alone
        ready: Future[None] = Future()
        self._thread = threading.Thread(
            target=lambda: asyncio.run(self._run(ready)), name="m3-remote-engine", daemon=True
        )
        self._thread.start()
        ready.result()

    @property
    def head(self) -> Head:
        """See `Core.head`."""
        return self._server.head

    def add(self, jobs: list[Job], ended: Ended) -> None:
        """See `Core.add`."""
        with self._lock:
            if self._closed:
                raise EngineClosedError("the engine is closed: it takes no more requests")
            self._loop.call_soon_threadsafe(self._begin, jobs, ended)

    def cancel(self, job: Job) -> None:
        """See `Core.cancel`. The server hears of it by the end of the connection."""
        with self._lock:
            if self._thread.is_alive() and not self._loop.is_closed():
                self._loop.call_soon_threadsafe(self._cancel, job)

    def close(self) -> None:
        """See `Core.close`. The server goes on."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._closing.set)
        if not self.is_own_thread():
            self._thread.join()

    def is_own_thread(self) -> bool:
        """See `Core.is_own_thread`."""
        return threading.current_thread() is self._thread

    # -- the thread ---------------------------------------------------------------------------------------------

    async def _run(self, ready: "Future[None]") -> None:
        self._loop, self._closing = asyncio.get_running_loop(), asyncio.Event()
        async with self._server.client() as client:
            self._client = client
            ready.set_result(None)
            await self._closing.wait()
            while self._tasks:
                for task in self._tasks.values():
                    task.cancel()
                await asyncio.sleep(0)

    def _begin(self, jobs: list[Job], ended: Ended) -> None:
        for job in jobs:
            task = self._tasks[job] = self._loop.create_task(self._answer(job, self._client))
            task.add_done_callback(lambda task, job=job: self._end(task, job, ended))  # type: ignore[misc]

    def _cancel(self, job: Job) -> None:
        if (task := self._tasks.get(job)) is not None:
            task.cancel()

    async def _answer(self, job: Job, client: httpx.AsyncClient) -> None:
        ids, wish = list(job.scheduled.prompt), None
        if job.request.stream is not None:
            ids, wish = self.head.ids + ids, _wish(job)
        async with aclosing(self._server.answer(client, ids, sampling(job.request.settings), wish)) as parts:
            reads: list[Mapping[str, Any]] = []
            async for part in parts:
                reads += part.reads
                for index, token in enumerate(part.tokens):
                    # The server tells them apart from tokens, so they may come before those that they follow.
                    while reads and reads[0]["tokens"] <= len(job.writing.tokens):
                        self._read(job, reads.pop(0))
                    job.tell(job.writing.take(token, part.log_probs[index] if part.log_probs else None))
                    if job.writing.stopped_by:
                        return
        job.ending = "length"

    def _end(self, task: "asyncio.Task[None]", job: Job, ended: Ended) -> None:
        del self._tasks[job]
        if task.cancelled():
            job.ending = "cancel"
        elif (error := task.exception()) is not None:
            job.ending = error if isinstance(error, Exception) else RuntimeError(repr(error))
        job.finish()
        ended(job)

    def _read(self, job: Job, read: Mapping[str, Any]) -> None:
        """Tell what the server recalled, of those memories that are still in the bank."""
        assert job.request.stream is not None
        memories = read["memories"]
        references = self._runtime.references([one["id"] for one in memories])
        known = [(one, found) for one, found in zip(memories, references, strict=True) if found is not None]
        recalled = Recalled(
            ids=tuple(one["id"] for one, _ in known),
            scores=tuple(one["score"] for one, _ in known),
            references=tuple(found for _, found in known),
            late=(),
            spec=self._runtime.bank.manifest.spec,
            device=self._runtime.device,
            dtype=job.request.stream.dtype,
            parts=(),
            tokens=sum(found.tokens for _, found in known),
            log_weights=(0.0,) * len(known),
        )
        job.writing.chunks.append(recalled)
        job.tell(Read(recalled, read["tokens"]))


def _wish(job: Job) -> dict[str, Any]:
    """What a request may read, as `m3model.vllm.wish.Wish` has it."""
    request = job.request
    assert request.stream is not None
    limits = request.stream.state.restriction
    said = {
        "query": request.prompt.query,
        "refresh": request.recall_every,
        "memories": limits.memories,
        "min_score": limits.min_score,
        "where": as_mappings(limits.where),
    }
    return {name: value for name, value in said.items() if value is not None}
