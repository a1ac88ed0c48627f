"""`Reading`: what is known of one request that reads memories; `Load`: what is written into its slots in a step."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from m3model.vllm.recalls import Memories
from m3model.vllm.wish import Wish
from m3runtime.errors import InputError, M3Error
from m3runtime.recall.recalled import Recalled

if TYPE_CHECKING:
    from m3runtime.stream import Stream

log = logging.getLogger("m3model.vllm")

OnRead = Callable[[Recalled, int], None]
"""Called with memories that are read from here on, and the tokens of the answer before them."""


@dataclass(eq=False, slots=True)
class Hosted:
    """A request of an engine in this process: its own stream, and who is told what."""

    stream: "Stream | None"
    on_read: OnRead
    refused: Exception | None = None
    """Why the request fails, once it does."""
    memories: Memories | None = None
    """The recall under way, or the last one."""


@dataclass(eq=False, slots=True)
class Load:
    """Memories to write into the slots of one request, in the next step."""

    request: str
    blocks: list[int]
    """Those of sink and slots, in order."""
    memories: Recalled
    whole: bool
    """Write the sink, too."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Parts do not travel to other processes: each worker reads the bank itself."""
        return Load, (self.request, self.blocks, self.memories.without_parts(), self.whole)


@dataclass(eq=False, slots=True)
class Reading:
    """One request that reads memories, or is refused."""

    request: Any
    wish: Wish
    stream: "Stream | None" = None
    hosted: Hosted | None = None
    refused: Exception | None = None
    chunk: int = -1
    """The last chunk that memories were asked for: 0 is the prompt."""
    memories: Memories | None = None
    """What was asked for and is not in the slots yet."""
    held: Recalled | None = None
    """What is in the slots, or will be after the step under way."""
    is_new: bool = False
    """Was it admitted in this step, with slots that are not written yet?"""
    hinted: int = -1
    reads: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_last(self) -> bool:
        """Has it asked for the last of the memories that it names? Those stay."""
        return self.wish.ids is not None and self.chunk >= len(self.wish.ids) - 1

    def refuse(self, error: Exception) -> None:
        """It ends with its next step."""
        if self.refused is None:
            self.refused = error
            if not isinstance(error, M3Error):
                log.error("request %s fails", self.request.request_id, exc_info=error)
            else:
                log.warning("request %s is refused: %s", self.request.request_id, error)
        if self.hosted is not None:
            self.hosted.refused = self.refused

    @property
    def reason(self) -> str:
        """Why it is refused, as its client may know it."""
        return str(self.refused) if isinstance(self.refused, M3Error) else "an internal error; see the log"

    @property
    def status(self) -> int:
        """The HTTP status of that."""
        return 400 if isinstance(self.refused, InputError) else 500

    def check(self, slots: int) -> None:
        """Raise the error of its recall, or for more memories than there are slots for."""
        assert self.memories is not None
        recalled = self.memories.result()
        if self.wish.ids is not None and recalled.tokens > slots:
            raise InputError(
                f"kv_transfer_params.m3.ids: they have {recalled.tokens} tokens, and there are {slots} slots"
            )

    def note(self, recalled: Recalled, answered: int) -> dict[str, Any]:
        """It reads these memories after so many tokens of its answer. Returns that as JSON."""
        kept = recalled.without_parts()
        if self.hosted is not None:
            self.hosted.on_read(kept, answered)
        memories = [
            {
                "id": id,
                "score": round(score, 6),
                "source": reference.places[0].name if reference.places else "",
                "span": [reference.start, reference.end] if reference.places else None,
            }
            for id, score, reference in zip(kept.ids, kept.scores, kept.references, strict=True)
        ]
        self.reads.append({"tokens": answered, "memories": memories})
        return self.reads[-1]

    def close(self) -> None:
        """Close its stream, if that is its own, once no recall uses it any more."""
        if self.hosted is not None or self.stream is None:
            return
        if self.memories is None:
            _close(self.stream)
        else:
            self.memories.add_done_callback(partial(_close, self.stream))


def _close(stream: "Stream", *_: object) -> None:
    try:
        stream.close()
    except Exception:
        log.exception("a stream cannot be closed")  # nobody waits for it any more, and the engine is to live
