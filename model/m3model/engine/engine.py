"""`MemoryEngine`: decodes many requests at once on one model, each with its own memories."""

import os
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch

from m3model.attention.layout import Pair
from m3model.attention.rope import check_positions
from m3model.engine.buffers import RowBuffers, rounded
from m3model.engine.job import Job, Words
from m3model.engine.recaller import Arrived, Recaller
from m3model.engine.running import Outcome, Runner
from m3model.engine.sampling import NO_TOKEN
from m3model.engine.scheduler import Plan, Scheduled, Scheduler
from m3model.engine.writing import Reason
from m3runtime.adapters.engine import End, Engine, Failure, OnEvent, Read, Request, Ticket
from m3runtime.config.schema import GenerateConfig
from m3runtime.device.threads import prepare, release, turn
from m3runtime.errors import ConfigError, EngineClosedError, ForkedError, InputError, PromptTooLongError
from m3runtime.recall.recalled import Recalled

_OVERFLOWED = "model.dtype: the model's numbers overflow in {dtype} here; use bfloat16 or float32"
_READING = 8
"""Prompts that are read at once where nobody decodes."""

Arrange = Callable[[Sequence[Pair]], list[Pair]]


class MemoryEngine(Engine):
    """See `m3runtime.adapters.engine.Engine`. Steps run in one thread, which ends when nothing is left to do."""

    def __init__(
        self,
        model: Any,
        buffers: RowBuffers,
        words: Words,
        *,
        offset: int,
        arrange: Arrange | None,
        rows: int,
        room: int,
        busy: threading.Lock,
    ) -> None:
        """``offset`` is the position of the first token of context after sink and memories.

        ``rows`` and ``room`` are ``model.rows`` and ``model.room``. ``busy`` is held while the model computes.
        """
        self.words = words
        self._buffers = buffers
        self._offset = offset
        self._arrange = arrange
        self._runner = Runner(model, buffers)
        self._rows = rows
        self._room = room
        self._busy = busy
        self._scheduler = Scheduler(rows, self._fits)
        self._recaller = Recaller(buffers.layout.device, words, rows, self._bring)
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = self._heard_close = False
        self._process = os.getpid()
        # What other threads bring; the engine's thread takes it between two steps.
        self._new: list[Job] = []
        self._cancelled: list[Job] = []
        self._arrived: list[Arrived] = []
        # The engine's thread alone.
        self._jobs: dict[Scheduled, Job] = {}
        self._recalling = 0
        self._under_way: Outcome | None = None

    @property
    def preempted(self) -> int:
        """How often a request had to give its row back, to be read again later."""
        return self._scheduler.preempted

    # -- from any thread ----------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[Request], on_event: OnEvent) -> list[Ticket]:
        """See `Engine.submit`."""
        if os.getpid() != self._process:
            raise ForkedError("the model was opened before this process forked; open it in this process, or use spawn")
        jobs = []
        for index, request in enumerate(requests):
            ids = self.words.ids(request.prompt, request.stream is not None)
            self._check(request, ids)
            jobs.append(Job(request, index, on_event, ids, self.words, self.cancel))
        release()
        with self._changed:
            if self._closed:
                raise EngineClosedError("the engine is closed: it takes no more requests")
            if self._thread is None and jobs:
                cores = torch.get_num_threads()
                thread = threading.Thread(target=self._run, args=(cores,), name="m3-engine")
                thread.start()  # it may fail, or be interrupted: nothing is queued then, and the thread finds it so
                self._thread = thread
            self._new += jobs
            self._changed.notify_all()
        return list(jobs)

    def cancel(self, job: Job) -> None:
        """End a request; see `Ticket.cancel`."""
        if os.getpid() != self._process:
            return  # a forked process has a copy of the lock, which nobody may ever open
        with self._changed:
            if self._thread is not None:
                self._cancelled.append(job)
                self._changed.notify_all()

    def close(self) -> None:
        """See `Engine.close`. A listener that calls it does not wait."""
        if os.getpid() != self._process:
            return
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            thread = self._thread
        if thread is threading.current_thread():
            return
        if thread is not None:
            thread.join()
        self._recaller.close()
        self._runner.drop()

    def _check(self, request: Request, ids: Sequence[int]) -> None:
        """Raise `InputError` for a request that can never be answered."""
        if not ids:
            raise InputError("a prompt needs at least one token")
        vocabulary = self._runner.sampling.vocabulary
        if strange := [token for token in request.settings.logit_bias if not 0 <= token < vocabulary]:
            raise InputError(f"generate.logit_bias: {strange[0]} is no token; the model's are 0 to {vocabulary - 1}")
        most = len(ids) + request.settings.max_new_tokens
        check_positions(most + self._start(request), self._buffers.layout.positions)
        if not self._fits(1, most):
            raise PromptTooLongError(
                f"model.room: {self._room} bytes do not hold the keys and values of {len(ids)} tokens of prompt and "
                f"{request.settings.max_new_tokens} of answer; raise it, shorten the prompt, or lower max_new_tokens"
            )

    # -- the engine's thread ------------------------------------------------------------------------------------

    def _run(self, cores: int) -> None:
        prepare(self._buffers.layout.device, cores)
        with torch.inference_mode():
            while self._turn():
                pass

    def _turn(self) -> bool:
        """One round: hear the news, recall, step. False once there is nothing left to do."""
        with self._changed:
            if self._thread is not threading.current_thread():
                return False  # whoever started it was interrupted
            new, self._new = self._new, []
            cancelled, self._cancelled = self._cancelled, []
            arrived, self._arrived = self._arrived, []
            self._heard_close = self._closed
            if self._closed:
                cancelled = [*self._jobs.values(), *new]
            elif not (new or arrived or self._jobs):
                self._thread = None
                return False
        try:
            self._hear(new, cancelled, arrived)
            self._work()
        except Exception as error:  # noqa: BLE001 - told to whoever is under way: nothing is left to go on with
            self._under_way = None
            for job in list(self._jobs.values()):
                self._stop(job, error)
        # Not `_closed`: what was queued between the beginning of this round and the close is still to be told.
        if self._heard_close and not self._jobs and not self._recalling:
            with self._changed:
                self._thread = None
            return False
        return True

    def _hear(self, new: Sequence[Job], cancelled: Sequence[Job], arrived: Sequence[Arrived]) -> None:
        for job in new:
            self._jobs[job.scheduled] = job
            self._scheduler.add(job.scheduled)
        for job in cancelled:
            if job.scheduled in self._jobs:
                self._stop(job, "cancel")
        for one in arrived:
            self._returned(one)
        for one in arrived:
            self._deliver(one)

    def _work(self) -> None:
        for row, to in self._scheduler.compact():
            moved = next(one for one in self._scheduler.running if one.row == to)
            if self._jobs[moved].ending is None:  # or nobody reads it any more, and it may be gone
                self._runner.move(row, to, moved.read)
        admitted = self._scheduler.admit()
        for sequence in admitted:
            self._begin(self._jobs[sequence])
        due = [self._jobs[sequence] for sequence in self._scheduler.due()]
        for job in due:
            job.scheduled.recalling = True
        plan = self._scheduler.plan(most_reading=_READING)
        is_idle = not (plan.decoding or plan.reading)
        if due:
            self._recalling += 1
            self._recaller.start(due)
        launched = None if is_idle else self._launch(plan)
        before, self._under_way = self._under_way, launched
        # A step on a GPU is launched before the results of the last one are read, so that it never waits for Python.
        if before is not None:
            self._finish(before)
        if launched is not None and not self._runner.runs_ahead:
            self._under_way = None
            self._finish(launched)
        if self._jobs and before is None and launched is None and not due:
            self._wait()

    def _wait(self) -> None:
        """Wait until another thread brings something: it has all cores meanwhile."""
        release()
        with self._changed:
            if not (self._new or self._arrived or self._cancelled or self._closed != self._heard_close):
                self._changed.wait()

    # -- rows ---------------------------------------------------------------------------------------------------

    def _fits(self, rows: int, tokens: int) -> bool:
        return self._buffers.bytes_of(rows, self._buffers.region, rounded(tokens)) <= self._room

    def _start(self, request: Request) -> int:
        """The position of a request's first token of context."""
        return self._offset if request.stream is not None else 0

    def _begin(self, job: Job) -> None:
        """Prepare a row that a sequence was given, for the first time or again."""
        row, settings = job.scheduled.row, job.request.settings
        assert row is not None
        self._reserve(settings, tokens=len(job.scheduled.prompt) + settings.max_new_tokens)
        self._buffers.begin(row, sink=job.request.stream is not None)
        job.slots = ()
        self._runner.sampling.begin(row, settings, job.scheduled.prompt, job.scheduled.answer)

    def _reserve(self, settings: GenerateConfig, *, memories: int = 0, tokens: int = 0) -> None:
        """Make room for all that runs, for columns of memories, and for so many tokens of a row if they fit."""
        rows = max((one.row + 1 for one in self._scheduler.running if one.row is not None), default=0)
        least = self._scheduler.tokens
        context = max(least, tokens) if self._fits(rows, tokens) else least
        self._runner.reserve(rows, memories, context, settings, room=self._room)

    def _stop(self, job: Job, how: Reason | Exception) -> None:
        """End a request early: now, or once no recall uses its stream any more."""
        if job.scheduled.recalling:
            job.ending = job.ending or how
        elif isinstance(how, Exception):
            self._end(job, Failure(how))
        else:
            job.tell(job.writing.end(how))
            self._end(job, End(job.writing.answer()))

    def _end(self, job: Job, event: End | Failure) -> None:
        """Take a request out. The device does nothing: it may have failed."""
        del self._jobs[job.scheduled]
        self._scheduler.end(job.scheduled)
        job.tell(event)

    # -- steps --------------------------------------------------------------------------------------------------

    def _launch(self, plan: Plan) -> Outcome:
        settings = [self._jobs[one].request.settings for one in plan.sequences]
        if self._scheduler.tokens > self._buffers.context:
            self._reserve(GenerateConfig(), tokens=self._scheduler.tokens + self._buffers.context // 2)
        with self._busy, turn(self._buffers.layout.device, keep=True):
            outcome = self._runner.launch(
                plan,
                settings,
                offset=lambda one: self._start(self._jobs[one].request),
                uniform=lambda one: self._uniform(self._jobs[one]),
                slots=lambda one: self._jobs[one].slots,
            )
        self._scheduler.launched(plan)
        return outcome

    def _uniform(self, job: Job) -> float:
        return 0.0 if job.uniforms is None else float(job.uniforms[job.scheduled.drawn])

    def _finish(self, outcome: Outcome) -> None:
        """Take the tokens that a step drew."""
        results = outcome.results()
        going_on = []
        for sequence, index in outcome.places.items():
            job = self._jobs.get(sequence)
            if job is None:
                continue  # it ended while the step was under way
            token, log_prob = results.token(index, job.request.settings.log_probs)
            if token == NO_TOKEN:
                assert sequence.row is not None
                self._runner.wipe(sequence.row)
                self._stop(job, ConfigError(_OVERFLOWED.format(dtype=str(self._buffers.layout.dtype)[6:])))
                continue
            sequence.answer.append(token)
            shares = results.shares_of(index, outcome.slots[sequence]) if job.request.settings.grounding else None
            job.tell(job.writing.take(token, log_prob, shares))
            if job.writing.stopped_by:
                self._end(job, End(job.writing.answer()))
            else:
                going_on.append(job)
        self._recaller.look_ahead(going_on, self._stop)

    # -- memories -----------------------------------------------------------------------------------------------

    def _bring(self, arrived: Arrived) -> None:
        """Hand what a recall found to the engine's thread."""
        with self._changed:
            self._arrived.append(arrived)
            self._changed.notify_all()

    def _returned(self, arrived: Arrived) -> None:
        """Note that a recall has ended: of all its rows, before anything is done that may fail for one."""
        self._recalling -= 1
        for one in arrived.found:
            one.who.scheduled.recalling = False

    def _deliver(self, arrived: Arrived) -> None:
        for one in arrived.found:
            job = one.who
            if job.ending is not None:
                self._stop(job, job.ending)
            elif isinstance(one.recalled, Exception):
                self._stop(job, one.recalled)
            else:
                self._read(job, one.recalled, arrived.event)

    def _read(self, job: Job, recalled: Recalled, event: torch.Event | None) -> None:
        """Let a row attend to what was recalled for it."""
        row = job.scheduled.row
        assert row is not None
        self._recaller.take(recalled.parts, event)
        parts, names = list(recalled.parts), list[Hashable](recalled.ids)
        if self._arrange is not None:  # how one is arranged depends on its place
            parts, names = self._arrange(parts), list(enumerate(recalled.ids))
        self._reserve(job.request.settings, memories=sum(keys.shape[2] for keys, _ in parts))
        slots = self._buffers.put_memories(row, parts, names, recalled.log_weights)
        job.slots = tuple(zip(recalled.ids, slots, strict=True))
        place = job.scheduled.recalled = job.scheduled.read
        if place > job.told:
            job.told = place
            kept = recalled.without_parts()
            job.writing.chunks.append(kept)
            job.tell(Read(kept, len(job.scheduled.answer)))
