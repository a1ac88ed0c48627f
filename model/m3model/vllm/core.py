"""`LocalCore`: a vLLM engine in this process, and the thread that steps it."""

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from itertools import count
from typing import Any

from m3model.engine.job import Job
from m3model.vllm import hosting
from m3model.vllm.connector import MemoryConnector
from m3model.vllm.engine import Core, sampling
from m3model.vllm.reading import Hosted
from m3model.vllm.wish import Head
from m3runtime.adapters.answers import TokenLogProb
from m3runtime.adapters.engine import Read
from m3runtime.config.schema import GenerateConfig
from m3runtime.errors import EngineClosedError, M3Error
from m3runtime.recall.recalled import Recalled
from m3runtime.runtime import Runtime


class LocalCore(Core):
    """Runs requests on vLLM. `add` and `cancel` may be called from any thread, `close` from any but its own."""

    def __init__(self, make: Callable[[], Any], runtime: Runtime) -> None:
        """``make`` gives vLLM's engine, whose connector then reads the bank of ``runtime``. Raises what it raises."""
        self._changed = threading.Condition()
        self._new: list[tuple[Job, Callable[[Job], None]]] = []
        self._cancelled: list[Job] = []
        self._closed = False
        # The thread's alone.
        self._jobs: dict[str, Job] = {}
        self._hosted: dict[Job, Hosted] = {}
        self._names: dict[Job, str] = {}
        self._parting: set[Job] = set()
        self._ended: dict[Job, Callable[[Job], None]] = {}
        self._numbers = count(1)
        opened: Future[Any] = Future()
        self._thread = threading.Thread(target=self._run, args=(make, runtime, opened), name="m3-vllm", daemon=True)
        self._thread.start()
        self._head: Head
        self.config, self._head = opened.result()

    @property
    def head(self) -> Head:
        """See `Core.head`."""
        return self._head

    # -- from any thread ----------------------------------------------------------------------------------------

    def add(self, jobs: list[Job], ended: Callable[[Job], None]) -> None:
        """See `Core.add`."""
        with self._changed:
            if self._closed:
                raise EngineClosedError("the engine is closed: it takes no more requests")
            self._new += [(job, ended) for job in jobs]
            self._changed.notify_all()

    def cancel(self, job: Job) -> None:
        """See `Core.cancel`."""
        with self._changed:
            self._cancelled.append(job)
            self._changed.notify_all()

    def close(self) -> None:
        """See `Core.close`. vLLM is shut down."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if not self.is_own_thread():
            self._thread.join()

    def is_own_thread(self) -> bool:
        """See `Core.is_own_thread`."""
        return threading.current_thread() is self._thread

    # -- the thread ---------------------------------------------------------------------------------------------

    def _run(self, make: Callable[[], Any], runtime: Runtime, opened: "Future[tuple[Any, Head]]") -> None:
        try:
            self._llm = make()
            connector = hosting.connector_of(self._llm)
            assert isinstance(connector, MemoryConnector)
            connector.read(runtime)
            assert connector.scheduler is not None
            self._half = connector.scheduler
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            opened.set_exception(error)
            return
        opened.set_result((hosting.config_of(self._llm), connector.head))
        while self._turn():
            pass
        hosting.shut_down(self._llm)

    def _turn(self) -> bool:
        with self._changed:
            while not (self._new or self._cancelled or self._jobs or self._closed or self._gone()):
                self._changed.wait()
            new, self._new = self._new, []
            cancelled, self._cancelled = self._cancelled, []
            closed = self._closed
        for job, ended in new:
            self._ended[job] = ended
            self._begin(job)
        for job in [*self._hosted] if closed else cancelled:
            self._stop(job, "cancel")
        for job in self._gone():
            self._end(job)
        if not self._jobs:
            if self._parting:
                self._wait_for_parting()
            return not closed or bool(self._parting)
        try:
            for output in self._llm.step():
                self._take(output)
        except Exception as error:  # noqa: BLE001 - told to whoever is under way: vLLM's state is not known any more
            with self._changed:
                self._closed = True
            for job in list(self._jobs.values()):
                self._stop(job, error)
        return True

    def _gone(self) -> list[Job]:
        """Jobs that have ended, and whose streams no recall uses any more."""
        return [job for job in self._parting if (one := self._hosted[job].memories) is None or one.done()]

    def _wait_for_parting(self) -> None:
        with self._changed:
            if not (self._new or self._cancelled or self._gone()):
                self._changed.wait(0.05)

    def _begin(self, job: Job) -> None:
        request, ids = job.request, list(job.scheduled.prompt)
        hosted = self._hosted[job] = Hosted(request.stream, lambda recalled, tokens: self._read(job, recalled, tokens))
        number, wish = next(self._numbers), None
        try:
            if request.stream is not None:
                self._half.hosted[number] = hosted
                wish = {"stream": number, "query": request.prompt.query, "refresh": request.recall_every}
                ids = self.head.ids + ids
            self._names[job] = name = hosting.submit(self._llm, ids, _sampling(request.settings, wish))
            self._jobs[name] = job
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            self._stop(job, error)
        finally:
            self._half.hosted.pop(number, None)

    def _read(self, job: Job, recalled: Recalled, tokens: int) -> None:
        job.writing.chunks.append(recalled)
        job.tell(Read(recalled, tokens))

    def _take(self, output: Any) -> None:
        job = self._jobs.get(output.request_id)
        if job is None:
            return
        for piece in output.outputs:
            for index, token in enumerate(piece.token_ids):
                log_prob = None if piece.logprobs is None else _log_prob(token, piece.logprobs[index], job)
                job.tell(job.writing.take(token, log_prob))
                if job.writing.stopped_by:
                    break
        if job.writing.stopped_by:
            self._leave(job)
        elif output.finished:
            refused = self._hosted[job].refused
            with self._changed:  # what failed in the step that a cancellation came in was no longer wanted
                cancelled = job in self._cancelled
            error = refused or M3Error("vLLM ended the request with an error; see its log")
            self._stop(job, "cancel" if cancelled else error)

    # -- ends ---------------------------------------------------------------------------------------------------

    def _stop(self, job: Job, how: Any) -> None:
        """End a job early."""
        if job not in self._hosted or job in self._parting:
            return
        job.ending = how
        self._leave(job)

    def _leave(self, job: Job) -> None:
        """Take a job out of vLLM; its last event comes once no recall uses its stream."""
        name = self._names.pop(job, None)
        if name is not None and self._jobs.pop(name, None) is not None:
            hosting.abort(self._llm, name)
        self._parting.add(job)
        memories = self._hosted[job].memories
        if memories is not None and not memories.done():
            memories.add_done_callback(lambda _: self._notice())
        else:
            self._end(job)

    def _notice(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _end(self, job: Job) -> None:
        self._parting.discard(job)
        del self._hosted[job]
        job.finish()
        self._ended.pop(job)(job)


def _sampling(settings: GenerateConfig, wish: Mapping[str, Any] | None) -> dict[str, Any]:
    extra = None if wish is None else {"kv_transfer_params": {"m3": dict(wish)}}
    return {**sampling(settings), "detokenize": False, "extra_args": extra}


def _log_prob(token: int, found: Mapping[int, Any], job: Job) -> TokenLogProb:
    ranked = sorted(found.items(), key=lambda one: one[1].rank)
    best = tuple((other, float(one.logprob)) for other, one in ranked[: job.request.settings.log_probs or 0])
    return TokenLogProb(token, float(found[token].logprob), best)
