"""The `Engine` contract: decodes many requests at once on one model; and its requests and events."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue
from typing import TYPE_CHECKING

from m3runtime.adapters.answers import Answer, OnText, Prompt, TokenLogProb

if TYPE_CHECKING:
    from m3runtime.config.schema import GenerateConfig
    from m3runtime.recall.recalled import Recalled
    from m3runtime.stream import Stream


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt to continue."""

    prompt: Prompt
    settings: "GenerateConfig"
    stream: "Stream | None" = None
    """Recalls memories at each chunk; None for the model as it is, without sink and memories.

    The engine's own from `Engine.submit` to the last event; closing it stays the caller's.
    """
    recall_every: int = 1
    """Chunks of the answer from one recall to the next; 0: the answer keeps the memories of the prompt's last chunk."""


@dataclass(frozen=True, slots=True)
class Read:
    """New memories are read from here on."""

    recalled: "Recalled" = field(repr=False)
    """Without its parts."""
    tokens: int
    """Tokens of the answer before it; 0 while the prompt is read."""


@dataclass(frozen=True, slots=True)
class Piece:
    """More of the answer: text that can no longer change, and the tokens since the last piece.

    The text may be of other tokens: half a character is held back, and what may become a stop text.
    """

    text: str
    tokens: tuple[int, ...]
    log_probs: tuple[TokenLogProb, ...] = ()
    """One for each token, if ``settings.log_probs`` asks for them."""


@dataclass(frozen=True, slots=True)
class End:
    """The last event of a request that was answered, or cancelled."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class Failure:
    """The last event of a request that could not be answered. Other requests go on."""

    error: Exception


Event = Read | Piece | End | Failure

OnEvent = Callable[[int, Event], None]
"""Called with the number of the request in its submission and an event, from a thread of the engine, in order.

The engine decodes nothing meanwhile, so it hands the event on and returns. If it raises, its request is cancelled.
"""


class Ticket(ABC):
    """A request that was submitted."""

    @abstractmethod
    def cancel(self) -> None:
        """End the request with what has been written; its row is free after the step under way. From any thread.

        Its last event comes all the same. Cancelling twice, or after the end, is fine.
        """


class Engine(ABC):
    """Decodes many requests at once on one model, each with its own memories. Thread-safe.

    Batch law: a request gets the same tokens alone and beside any others, whenever it joined. Memories are overwritten
    in their slots in place, and a recall never stops the rows that do not need it.
    """

    @abstractmethod
    def submit(self, requests: Sequence[Request], on_event: OnEvent) -> list[Ticket]:
        """Queue requests, which begin together if there is room for all.

        Raises `InputError` if one of them can never be answered (no token, more than the model has positions for or
        the engine has room for): then none is queued. Raises `EngineClosedError` after `close`.
        """

    @abstractmethod
    def close(self) -> None:
        """Cancel what is under way, wait for its last events, and drop the buffers. Closing twice is fine.

        A listener may close the engine too; it does not wait.
        """


def answers(engine: Engine, requests: Sequence[Request], on_text: OnText | None = None) -> list[Answer]:
    """Submit requests and wait for all answers. ``on_text`` is called in the calling thread.

    Raises the first request's error, once the others are cancelled and have ended; so does an interrupt.
    """
    events: SimpleQueue[tuple[int, Event]] = SimpleQueue()

    def hear(index: int, event: Event) -> None:
        # Nothing else: a thread that is woken at each token takes the interpreter from the engine's own.
        if isinstance(event, End | Failure) or (on_text and isinstance(event, Piece) and event.text):
            events.put((index, event))

    tickets = engine.submit(requests, hear)
    ended: dict[int, End | Failure] = {}
    try:
        while len(ended) < len(requests):
            index, event = events.get()
            if isinstance(event, Piece) and on_text:
                on_text(index, event.text)
            elif isinstance(event, End | Failure):
                ended[index] = event
                if isinstance(event, Failure):
                    raise event.error
    finally:
        for ticket in tickets:
            ticket.cancel()
        while len(ended) < len(requests):  # their streams are the engine's until then
            index, event = events.get()
            if isinstance(event, End | Failure):
                ended[index] = event
    return [end.answer for _, end in sorted(ended.items()) if isinstance(end, End)]
