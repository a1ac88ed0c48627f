"""`SchedulerHalf`: which request reads which memories, and when its slots are written.

vLLM calls the hooks from one thread, between two steps. An exception in one would end the engine for everybody, so
whatever goes wrong refuses the one request that it went wrong for.
"""

import logging
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import wait as wait_for
from functools import partial
from typing import TYPE_CHECKING, Any

from m3model.engine.recalls import hint
from m3model.vllm import compat
from m3model.vllm.reading import Hosted, Load, Reading
from m3model.vllm.recalls import Memories, Recalls, fitting
from m3model.vllm.wish import Head, Wish
from m3model.vllm.words import Words
from m3runtime.errors import InputError
from m3runtime.memory.spec import fingerprint
from m3runtime.recall.recalled import Recalled

if TYPE_CHECKING:
    from m3runtime.stream import Stream

log = logging.getLogger("m3model.vllm")

_IDLE_S = 0.005
"""Time that a step with nothing to do waits for a recall, so that the engine does not spin beside it."""


class SchedulerHalf:
    """The hooks of the scheduler. One thread."""

    def __init__(
        self,
        head: Head,
        recalls: Recalls,
        shape: compat.Shape,
        words: Words,
        tell: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        """``tell`` is called with what requests read, and why they are refused: see `m3model.vllm.telling`."""
        self._head = head
        self._tell = tell or (lambda _: None)
        self._recalls = recalls
        self._shape = shape
        self._decode, self._words = words.decode, words
        self._config = recalls.runtime.config.recall
        self._readings: dict[str, Reading] = {}
        self._is_idle = True
        self.hosted: dict[int, Hosted] = {}
        """Requests of an engine in this process, by the number that their wish names."""

    # -- requests -----------------------------------------------------------------------------------------------

    def add(self, request: Any) -> None:
        """A request has come. Begin its recall."""
        reading = None
        try:
            ids = compat.prompt_ids(request) or ()
            wish = Wish.of(compat.params_of(request))
            if wish is None and not self._head.resembles(ids):
                return
            reading = self._readings[request.request_id] = Reading(request, wish or Wish())
            self._begin(reading, ids)
        except Exception as error:  # noqa: BLE001 - it is told to whoever asked
            reading = reading or self._readings.setdefault(request.request_id, Reading(request, Wish()))
            reading.refuse(error)

    def _begin(self, reading: Reading, ids: Sequence[int]) -> None:
        request, wish = reading.request, reading.wish
        if wish.stream is not None and (hosted := self.hosted.get(wish.stream)) is not None:
            reading.hosted, reading.stream = hosted, hosted.stream
        if (reason := compat.unserved(request)) is not None:
            raise InputError(f"not with memories: {reason}")
        if not self._head.begins(ids):
            raise InputError(
                f"a prompt that reads memories begins with {len(self._head)} tokens: the sink "
                f"{list(self._head.sink)}, then {self._head.slots} times {self._head.placeholder}, and goes on with "
                "another one; see m3model.vllm.head"
            )
        if wish.shares:
            said = [wish.off, wish.ids, wish.log_weights]
            compat.salt(request, fingerprint([self._recalls.runtime.bank.manifest.stamp.bank, said]))
        else:
            compat.salt(request, secrets.token_hex(16))
        if reading.stream is None:
            reading.stream = self._recalls.runtime.stream(self._shape.dtype, wish.restriction)
        end = ids[len(self._head) :][-self._config.chunk_tokens :]
        self._ask(reading, 0, lambda: wish.query or self._decode(self._words.last(end)))

    def _ask(self, reading: Reading, chunk: int, text: Callable[[], str]) -> None:
        """Ask for the memories of a chunk of the answer, or of the prompt (0)."""
        wish, reading.chunk = reading.wish, chunk
        if wish.off:
            reading.memories = self._recalls.name((), ())
        elif wish.ids is not None:
            at = min(chunk, len(wish.ids) - 1)
            reading.memories = self._recalls.name(wish.ids[at], wish.log_weights[at] if wish.log_weights else ())
        else:
            assert reading.stream is not None
            reading.memories = self._recalls.ask(reading.stream, text(), wait=True if chunk == 0 else None)
        if reading.hosted is not None:
            reading.hosted.memories = reading.memories

    def matched(self, request: Any, computed: int) -> int | None:
        """The tokens after the first ``computed`` that memories will fill; None while the recall is under way."""
        reading = self._readings.get(request.request_id)
        if reading is None:
            return 0
        try:
            self._recalls.send()
            if reading.refused is None and reading.memories is not None:
                if not reading.memories.done() and self._is_idle:
                    wait_for([reading.memories], _IDLE_S)
                if not reading.memories.done():
                    return None
                reading.check(self._head.slots)
        except Exception as error:  # noqa: BLE001 - it is told to whoever asked
            reading.refuse(error)
        if reading.refused is not None and computed:
            # Those are blocks of others, who would end with it: vLLM is to look again, for blocks of its own.
            compat.salt(request, secrets.token_hex(16))
            return None
        if reading.refused is not None:  # a part of its tokens, whose load then fails: so vLLM ends it, and it alone
            size: int = request.num_tokens
            return max(0, min(self._shape.block, size - 1) - computed)
        return max(0, len(self._head) - computed)

    def allocated(self, request: Any, external: int) -> None:
        """A request is admitted, with so many tokens to fill; maybe again."""
        reading = self._readings.get(request.request_id)
        if reading is not None:
            reading.is_new = external > 0

    # -- steps --------------------------------------------------------------------------------------------------

    def plan(self, scheduler_output: Any) -> tuple[list[Load], list[int]]:
        """What is loaded in a step, and a block of each request that is refused."""
        self._is_idle = not compat.scheduled(scheduler_output)
        if not self._readings:  # of most steps of a server that others use, too
            return [], []
        here = [found for name in compat.scheduled(scheduler_output) if (found := self._readings.get(name)) is not None]
        loads: list[Load] = []
        try:
            self._begin_chunks(here)
        except Exception as error:  # noqa: BLE001 - it is told to whoever asked
            for reading in here:
                reading.refuse(error)
        for reading in here:
            try:
                if reading.refused is None and (load := self._load(reading, scheduler_output)) is not None:
                    loads.append(load)
            except Exception as error:  # noqa: BLE001 - it is told to whoever asked
                reading.refuse(error)
        failed = [reading for reading in here if reading.refused is not None]
        blocks = [compat.blocks_of(scheduler_output, reading.request.request_id)[:1] for reading in failed]
        if loads or failed:
            compat.load_first(scheduler_output)
        return loads, [block for some in blocks for block in some]

    def _begin_chunks(self, readings: Sequence[Reading]) -> None:
        """Recall for all that have written a chunk, together, and wait until the deadline."""
        size, ahead = self._config.chunk_tokens, self._config.lookahead_tokens
        due: list[Memories] = []
        hints: list[tuple[Reading, Stream, str]] = []
        for reading in readings:
            every = reading.wish.every
            if not every or reading.refused is not None or reading.is_last:
                continue
            answer = compat.answer_ids(reading.request)
            chunk, place = divmod(len(answer), size)
            latest = chunk - chunk % every
            if latest > max(0, reading.chunk) and (reading.memories is None or reading.memories.done()):
                searched = self._config.searched(answer[(latest - 1) * size : latest * size])
                self._ask(reading, latest, partial(self._decode, list(searched)))
                assert reading.memories is not None
                due.append(reading.memories)
            elif (
                ahead
                and place == size - ahead
                and (chunk + 1) % every == 0
                and reading.wish.ids is None
                and reading.hinted < chunk
            ):
                reading.hinted = chunk
                assert reading.stream is not None
                hints.append((reading, reading.stream, self._decode(list(answer[-place:]))))
        self._recalls.send()
        hint(hints, Reading.refuse)
        if due:
            patience = None if self._config.when_late == "wait" else self._config.deadline
            wait_for(due, patience)

    def _load(self, reading: Reading, scheduler_output: Any) -> Load | None:
        """What is written into the slots of a request in this step, if anything is."""
        whole, reading.is_new = reading.is_new, False
        memories, answered = reading.memories, len(compat.answer_ids(reading.request))
        if memories is not None and memories.done():
            reading.memories = None
            recalled = fitting(memories.result(), self._head.slots)
            before, reading.held = reading.held, recalled
            read = reading.note(recalled, answered)
            self._tell({"request": reading.request.request_id, "read": read})
            if not whole and before is not None and _same(before, recalled):
                return None
            if not whole and before is None:
                return None  # vLLM had all of it in its prefix cache
        elif not whole:
            return None
        assert reading.held is not None
        blocks = compat.blocks_of(scheduler_output, reading.request.request_id)
        needed = -(-len(self._head) // self._shape.block)
        return Load(reading.request.request_id, blocks[:needed], reading.held, whole)

    # -- ends ---------------------------------------------------------------------------------------------------

    def finished(self, request: Any) -> dict[str, Any] | None:
        """A request has ended: tell what it read. Its stream is closed once no recall uses it any more."""
        reading = self._readings.pop(request.request_id, None)
        if reading is None:
            return None
        if reading.memories is not None:
            self._recalls.forget(reading.memories)
        reading.close()
        if reading.refused is None:
            return {"m3": {"reads": reading.reads}}
        self._tell({"request": request.request_id, "error": reading.reason, "status": reading.status})
        return {"m3": {"error": reading.reason}}

    def is_private(self, request: Any) -> bool:
        """Are the blocks of a request of no use to any other?"""
        reading = self._readings.get(request.request_id)
        return reading is not None and not (reading.wish.shares and reading.refused is None)

    def close(self) -> None:
        """End the threads."""
        self._recalls.close()


def _same(one: Recalled, other: Recalled) -> bool:
    return one.ids == other.ids and one.log_weights == other.log_weights
