"""`Worker`: a thread that does jobs in order, with a bounded queue."""

import _thread
from collections.abc import Callable
from queue import SimpleQueue
from types import TracebackType
from typing import Self

Job = Callable[[], object]


class Worker:
    """One thread that does the jobs of one other thread. A context manager.

    `do` and `finish` raise what a job raised, and no job is done after that. Leaving by an error drops the jobs that
    wait, and returns when the running job is done; a second interrupt does not wait even for that.

    The thread that gives jobs may be interrupted (`KeyboardInterrupt`) at any moment, since it takes none of the locks
    of `threading`. `ThreadPoolExecutor` does: interrupted in ``submit``, it ends in "release unlocked lock", and
    it would run the jobs behind a failed one.
    """

    def __init__(self, *, ahead: int) -> None:
        """``ahead`` is the most jobs that are queued or running."""
        self._ahead = ahead
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._ended: SimpleQueue[BaseException | None] = SimpleQueue()
        """The error of each finished job, or None; last, `_ThreadEnded`."""
        self._given = 0
        self._running = self._stopping = False

    def do(self, job: Job) -> None:
        """Queue a job. Waits while the queue is full. Raises what an earlier job raised."""
        while self._running and self._given >= self._ahead:
            self._wait_for_one()
        self._jobs.put(job)
        self._given += 1

    def finish(self) -> None:
        """Wait until all jobs are done. Raises what a job raised."""
        while self._running and self._given:
            self._wait_for_one()

    def __enter__(self) -> Self:
        # `Thread.start` waits by locks of Python's own. Nor would anybody wait for such a thread at the program's end.
        _thread.start_new_thread(self._run, ())
        self._running = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self._stopping = True
            self._jobs.put(None)
            while self._running:
                self._wait_for_one(quietly=True)

    def _wait_for_one(self, *, quietly: bool = False) -> None:
        error = self._ended.get()
        if isinstance(error, _ThreadEnded):
            self._running = False
            self._ended.put(error)  # for whoever else waits
            return
        self._given -= 1
        if error is not None and not quietly:
            raise error

    def _run(self) -> None:
        failed = False
        while True:
            job = self._jobs.get()
            if job is None:
                break
            error = None
            if not (failed or self._stopping):
                try:
                    job()
                except BaseException as raised:  # noqa: BLE001 - it is raised in the other thread
                    error, failed = raised, True
            self._ended.put(error)
            del job, error  # or what they hold would be held until the next job comes
        self._ended.put(_ThreadEnded())


class _ThreadEnded(BaseException):
    """Marks the end of the thread; never raised."""
