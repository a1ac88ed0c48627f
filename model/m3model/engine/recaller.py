"""`Recaller`: recalls memories for the rows of an engine, in threads of its own."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from m3model.attention.layout import Pair
from m3model.engine.job import Job, Words
from m3model.engine.recalls import Asking, Found, hint, recall
from m3runtime.device.side_stream import SideStream
from m3runtime.device.threads import prepare, release
from m3runtime.retrieval.query import Query, Text

_MOST = 8
"""Recalls that are under way at once; each is of all rows that began a chunk together."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """What one recall brought to all its rows."""

    found: Sequence[Found[Job]]
    event: torch.Event | None
    """On a GPU, what the engine's own stream waits for before it reads any part."""


class Recaller:
    """Turns rows that are due into recalls. `start` and `look_ahead` are called from the engine's thread alone."""

    def __init__(self, device: torch.device, words: Words, rows: int, bring: Callable[[Arrived], None]) -> None:
        """``bring`` is called once for each `start`, from any thread."""
        self._device = device
        self._words = words
        self._bring = bring
        self._side = SideStream(device)
        # Threads that stay: on a GPU each has a stream, and with it cached memory and a workspace of its own.
        self._threads = ThreadPoolExecutor(min(rows, _MOST), "m3-engine-recall")
        self._prepared = threading.local()

    def start(self, jobs: Sequence[Job]) -> None:
        """Recall for these in another thread: others may come, or be cancelled, before it ends."""
        try:
            asking = [self._asking(job) for job in jobs]
            self._threads.submit(self._recall, asking, torch.get_num_threads())
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            self._bring(Arrived([Found(job, error) for job in jobs], None))

    def look_ahead(self, jobs: Sequence[Job], failed: Callable[[Job, Exception], None]) -> None:
        """Give a hint for those that are soon due, where it is time for it. ``failed`` is told of whoever could not."""
        ahead = []
        for job in jobs:
            if (text := self._next_text(job)) is not None:
                assert job.request.stream
                ahead.append((job, job.request.stream, text))
        hint(ahead, failed)

    def take(self, parts: Sequence[Pair], event: torch.Event | None) -> None:
        """Let the current stream of the device wait for parts that arrived, before they are read."""
        self._side.arrive(event, [tensor for part in parts for tensor in part])

    def close(self) -> None:
        """Wait for what is under way."""
        self._threads.shutdown()

    def _recall(self, asking: Sequence[Asking[Job]], cores: int) -> None:
        event = None
        try:
            if getattr(self._prepared, "cores", None) != cores:  # once a thread: it takes longer than many a recall
                prepare(self._device, cores)
                self._prepared.cores = cores
            with torch.inference_mode(), self._side.use():
                found = recall(asking)
                event = self._side.mark()
            release()
        except Exception as error:  # noqa: BLE001 - told to whoever asked
            found = [Found(one.who, error) for one in asking]
        self._bring(Arrived(found, event))

    def _asking(self, job: Job) -> Asking[Job]:
        one, stream = job.scheduled, job.request.stream
        assert stream
        assert one.chunk
        if one.read >= len(one.prompt):
            searched = stream.runtime.config.recall.searched(one.chunk_tokens())
            return Asking(job, stream, self._of_answer(job, self._words.decode(searched)), None)
        prompt, after = job.request.prompt, one.read + one.chunk
        query, weight = prompt.query, stream.runtime.config.recall.turn_weight
        now: Text = query or self._words.decode(one.chunk_tokens())
        if query and prompt.context:
            now = Query.following(query, prompt.context, weight)
        if query or after >= len(one.prompt) or not stream.runtime.config.recall.lookahead_tokens:
            return Asking(job, stream, now, wait=True)
        text = self._words.decode(one.prompt[after : after + one.chunk])
        return Asking(job, stream, now, wait=True, next_text=None if text == now else text)

    def _of_answer(self, job: Job, chunk: str) -> Text:
        """A chunk of an answer, to search by together with the question."""
        assert job.request.stream
        prompt, recall_config = job.request.prompt, job.request.stream.runtime.config.recall
        weight, query = recall_config.question_weight, prompt.query
        if not query or not (weight or recall_config.reranker):
            return chunk
        asked = Query.following(query, prompt.context, recall_config.turn_weight).question
        return Query(chunk, (query,), (weight,), answers=asked) if weight else Query(chunk, answers=asked)

    def _next_text(self, job: Job) -> Text | None:
        """The text of the chunk so far, where it is time to look ahead for the recall at its end."""
        one, stream = job.scheduled, job.request.stream
        if stream is None or one.period is None:
            return None
        recall_config = stream.runtime.config.recall
        ahead = recall_config.lookahead_tokens
        if not ahead or len(one.answer) % one.period != one.period - ahead:
            return None
        return self._of_answer(job, self._words.decode(one.answer[ahead - recall_config.chunk_tokens :]))
