"""`Job`: one request on its way through the engine; `Words`: how an engine reads and writes text."""

import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from m3model.attention.slots import MemorySlots
from m3model.engine.sampling import uniforms
from m3model.engine.scheduler import Scheduled
from m3model.engine.writing import Reason, Writing
from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.engine import End, Failure, OnEvent, Piece, Read, Request, Ticket


@dataclass(frozen=True, slots=True)
class Words:
    """How an engine reads and writes text."""

    ids: Callable[[Prompt, bool], list[int]]
    """The tokens of a prompt, after the sink or without."""
    decode: Callable[[Sequence[int]], str]
    """The text of tokens, without special tokens."""
    stop_tokens: Callable[[], frozenset[int]]
    """The tokens that end an answer."""


class Job(Ticket):
    """A request on its way."""

    def __init__(
        self,
        request: Request,
        index: int,
        on_event: OnEvent,
        ids: list[int],
        words: Words,
        cancel: Callable[["Job"], None],
    ) -> None:
        """``index`` is its number in the submission, ``ids`` are its prompt's tokens; ``cancel`` is the engine's."""
        settings, stream = request.settings, request.stream
        chunk = stream.runtime.config.recall.chunk_tokens if stream else None
        self.request = request
        self.scheduled = Scheduled(ids, settings.max_new_tokens, chunk, request.recall_every)
        asked = (request.prompt.query or request.prompt.text) if stream else None
        self.writing = Writing(asked, settings, words.stop_tokens(), words.decode)
        self.uniforms = uniforms(settings.seed, settings.max_new_tokens) if settings.temperature > 0 else None
        self.slots: MemorySlots = ()
        """The memories that it reads now."""
        self.told = -1
        """The place of the last recall that was told: a sequence that lost its row recalls again what it had."""
        self.ending: Reason | Exception | None = None
        """How it ends as soon as the recall under way leaves its stream alone."""
        self._cancel = cancel
        self._index = index
        self._on_event = on_event

    def cancel(self) -> None:
        """See `Ticket.cancel`."""
        self._cancel(self)

    def finish(self) -> None:
        """Tell the last event: how it ends early, or its answer."""
        if isinstance(self.ending, Exception):
            self.tell(Failure(self.ending))
            return
        if self.ending is not None:
            self.tell(self.writing.end(self.ending))
        self.tell(End(self.writing.answer()))

    def tell(self, event: Read | Piece | End | Failure | None) -> None:
        """Hand an event to whoever asked."""
        if event is None:
            return
        try:
            self._on_event(self._index, event)
        except BaseException:  # noqa: BLE001 - reported below; whatever it is, the thread is not its own to end
            self._on_event = lambda *_: None
            self._cancel(self)
            threading.excepthook(threading.ExceptHookArgs((*sys.exc_info(), threading.current_thread())))
