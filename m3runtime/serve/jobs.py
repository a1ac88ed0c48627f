"""`Jobs`: changes of the bank, made one after the other by a process of their own, and what became of each."""

import logging
import multiprocessing
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from queue import Empty, Full, Queue
from typing import Any, Literal

from m3runtime.config.schema import Config
from m3runtime.errors import M3Error
from m3runtime.serve.changes import Change, Done, Failed, Progress, Word, work

log = logging.getLogger("m3runtime.serve")

State = Literal["queued", "running", "done", "failed"]

_START = "spawn"
"""The way in which the process starts: a fork would have locks that nobody opens."""
_KEPT = 256
"""Ended jobs that can still be asked about."""
_IDLE = 300.0
"""Seconds without a job after which the process, and its model, are given up."""
_GLANCE = 0.5
"""Seconds between two looks whether the server is being stopped."""


@dataclass(frozen=True, slots=True)
class Job:
    """A change of the bank as it stands."""

    kind: Literal["add", "forget", "verify"]
    name: str
    """The document or source that it is about; no text if it is about the whole bank."""
    id: str = field(default_factory=lambda: f"job-{uuid.uuid4().hex}")
    state: State = "queued"
    title: str = ""
    """The task that it is at."""
    done: int = 0
    total: int = 0
    """Steps of the task: done, and all."""
    result: dict[str, Any] | None = None
    error: str | None = None
    """One line, if it failed."""
    is_input_error: bool = False
    created: float = field(default_factory=time.time)
    """Seconds since 1970."""

    @property
    def has_ended(self) -> bool:
        """Will it not change any more?"""
        return self.state in ("done", "failed")


class JobsFullError(Exception):
    """So many jobs wait that another one is refused."""


class Jobs:
    """Makes changes in the order of their submission. Thread-safe; reads of the bank go on meanwhile.

    The process starts with the first job, and is replaced if it dies. A job is done when ``changed`` has returned, so
    that the next request recalls what was added, and nothing that was forgotten.
    """

    def __init__(
        self, config: Config, changed: Callable[[], None], *, waiting: int = 64, patience: float = 900
    ) -> None:
        """``changed`` is called after each change. A job without progress for ``patience`` seconds is stopped."""
        self._config = config
        self._changed = changed
        self._patience = patience
        self._queue = Queue[tuple[str, Change] | None](waiting)
        self._jobs = OrderedDict[str, Job]()
        self._lock = threading.Lock()
        self._process: BaseProcess | None = None
        self._connection: Connection[Change, Word] | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="m3-jobs", daemon=True)
        self._thread.start()

    def submit(self, job: Job, change: Change) -> Job:
        """Queue a change. Raises `JobsFullError`."""
        with self._lock:
            self._jobs[job.id] = job
            ended = [id for id, one in self._jobs.items() if one.has_ended]
            for id in ended[: max(0, len(self._jobs) - _KEPT)]:
                del self._jobs[id]
        try:
            self._queue.put_nowait((job.id, change))
        except Full:
            with self._lock:
                del self._jobs[job.id]
            raise JobsFullError(f"{self._queue.maxsize} jobs wait already; try again later") from None
        return job

    def get(self, id: str) -> Job | None:
        """A job as it stands now; None if there is none, or if it ended long ago."""
        with self._lock:
            return self._jobs.get(id)

    def all(self) -> list[Job]:
        """All jobs that are known, the newest first."""
        with self._lock:
            return list(reversed(self._jobs.values()))

    def close(self) -> None:
        """Stop the job under way, drop those that wait, and end the process. Closing twice is fine."""
        self._closing = True
        with suppress(Empty):
            while True:
                self._queue.get_nowait()
        self._queue.put(None)
        self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            try:
                item = self._queue.get(timeout=_IDLE if self._process else None)
            except Empty:
                self._stop()
                continue
            if item is not None:
                self._make(*item)
        self._stop()

    def _make(self, id: str, change: Change) -> None:
        self._note(id, state="running")
        word = self._asked(id, change)
        if isinstance(word, Done):
            try:
                self._changed()
            except M3Error as error:
                log.error("the server cannot read what changed in the bank: %s", error)
                word = Failed("the change was made, and the server cannot read it; its log says why", is_input=False)
        if isinstance(word, Done):
            self._note(id, state="done", result=word.result, title="")
        else:
            self._note(id, state="failed", error=word.message, is_input_error=word.is_input, title="")

    def _asked(self, id: str, change: Change) -> Done | Failed:
        """Have the process make a change, and wait for its last word."""
        try:
            connection = self._started()
            connection.send(change)
            heard = time.monotonic()
            while not self._closing and time.monotonic() - heard < self._patience:
                if not connection.poll(_GLANCE):
                    continue
                heard, word = time.monotonic(), connection.recv()
                if not isinstance(word, Progress):
                    return word
                self._note(id, title=word.title, done=word.done, total=word.total)
            self._stop(at_once=True)  # the bank survives that: each transaction is whole
            why = "the server is being stopped" if self._closing else f"no progress for {self._patience:.0f} seconds"
            return Failed(f"the job was stopped: {why}", is_input=False)
        except (EOFError, OSError):  # it was killed, by a document that took all memory, for example
            self._stop(at_once=True)
            return Failed("the process that changes the bank ended; the document may be too large", is_input=False)

    def _started(self) -> "Connection[Change, Word]":
        if self._connection is None or self._process is None or not self._process.is_alive():
            self._stop(at_once=True)
            context: Any = multiprocessing.get_context(_START)
            ours, theirs = context.Pipe()
            self._process = context.Process(target=work, args=(self._config, theirs), name="m3-changes", daemon=True)
            self._process.start()
            theirs.close()  # or the end of the process would not be noticed
            self._connection = ours
        return self._connection

    def _stop(self, *, at_once: bool = False) -> None:
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            if at_once:
                self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _note(self, id: str, **changes: Any) -> None:
        with self._lock:
            if id in self._jobs:
                self._jobs[id] = replace(self._jobs[id], **changes)
