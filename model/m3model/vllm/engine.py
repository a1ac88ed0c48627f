"""`VllmEngine`: vLLM behind the contract of engines; `Core`: where it runs, in this process or at a URL."""

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from m3model.engine.job import Job, Words
from m3model.vllm.wish import Head
from m3runtime.adapters.engine import Engine, OnEvent, Request, Ticket
from m3runtime.config.schema import GenerateConfig
from m3runtime.errors import EngineClosedError, InputError


class Core(ABC):
    """Runs jobs on vLLM, and tells their events. From any thread, but for `close`: not from its own."""

    @property
    @abstractmethod
    def head(self) -> Head:
        """The head of prompts that read memories."""

    @abstractmethod
    def add(self, jobs: list[Job], ended: Callable[[Job], None]) -> None:
        """Queue jobs. ``ended`` is called after the last event of each. Raises `EngineClosedError` after `close`."""

    @abstractmethod
    def cancel(self, job: Job) -> None:
        """End a job with what it has written."""

    @abstractmethod
    def close(self) -> None:
        """Cancel what is under way, and end."""

    @abstractmethod
    def is_own_thread(self) -> bool:
        """Is the caller its thread? It must not wait for itself."""


class VllmEngine(Engine):
    """See `m3runtime.adapters.engine.Engine`. The memories of a prompt are recalled once, before it is read."""

    def __init__(self, core: Core, words: Words, *, length: int, vocabulary: int, owns: bool = True) -> None:
        """``length`` is the most tokens of prompt and answer. Closing it closes the core, if it ``owns`` that."""
        self._core = core
        self._words = words
        self._length = length
        self._vocabulary = vocabulary
        self._owns = owns
        self._changed = threading.Condition()
        self._open: set[Job] = set()
        self._closed = False

    def submit(self, requests: Sequence[Request], on_event: OnEvent) -> list[Ticket]:
        """See `Engine.submit`."""
        jobs: list[Job] = []
        for index, request in enumerate(requests):
            ids = self._words.ids(request.prompt, request.stream is not None)
            self._check(request, ids)
            jobs.append(Job(request, index, on_event, ids, self._words, self._core.cancel))
        with self._changed:
            if self._closed:
                raise EngineClosedError("the engine is closed: it takes no more requests")
            self._core.add(jobs, self._ended)
            self._open.update(jobs)
        return list(jobs)

    def close(self) -> None:
        """See `Engine.close`. A listener that calls it does not wait."""
        with self._changed:
            self._closed = True
            jobs = list(self._open)
        for job in jobs:
            job.cancel()
        if not self._core.is_own_thread():
            with self._changed:
                self._changed.wait_for(lambda: not self._open)
        if self._owns:
            self._core.close()

    def _ended(self, job: Job) -> None:
        with self._changed:
            self._open.discard(job)
            self._changed.notify_all()

    def _check(self, request: Request, ids: Sequence[int]) -> None:
        """Raise `InputError` for a request that can never be answered."""
        if not ids:
            raise InputError("a prompt needs at least one token")
        if request.settings.grounding:
            raise InputError("generate.grounding: vLLM's attention does not tell what it read; leave it off")
        if strange := [token for token in request.settings.logit_bias if not 0 <= token < self._vocabulary]:
            raise InputError(
                f"generate.logit_bias: {strange[0]} is no token; the model's are 0 to {self._vocabulary - 1}"
            )
        head = 0 if request.stream is None else len(self._core.head)
        if head + len(ids) + request.settings.max_new_tokens > self._length:
            raise InputError(
                f"{len(ids)} tokens of prompt and {request.settings.max_new_tokens} of answer do not fit: of "
                f"{self._length} tokens, vLLM's max_model_len, {head} are for memories; shorten the prompt, or lower "
                "max_new_tokens"
            )


def sampling(settings: GenerateConfig) -> dict[str, Any]:
    """The fields of vLLM's ``SamplingParams`` and of its API. Where an answer stops is found here, not there."""
    return {
        "max_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": settings.top_k,
        "min_p": settings.min_p,
        "seed": settings.seed if settings.temperature > 0 else None,
        "repetition_penalty": settings.repetition_penalty,
        "frequency_penalty": settings.frequency_penalty,
        "presence_penalty": settings.presence_penalty,
        "logit_bias": dict(settings.logit_bias) or None,
        "logprobs": settings.log_probs,
        "ignore_eos": True,
    }
