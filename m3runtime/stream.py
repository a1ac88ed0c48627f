"""`Stream`: one sequence being decoded, and the leases on the memories that it reads."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, Self

import torch

from m3runtime.recall.recalled import Recalled, StreamState
from m3runtime.retrieval.query import Text
from m3runtime.retrieval.restriction import UNRESTRICTED, Restriction

if TYPE_CHECKING:
    from m3runtime.config.schema import Config


class Recaller(Protocol):
    """The runtime, as streams see it: a `Runtime`, or a substitute in an experiment."""

    @property
    def config(self) -> "Config":
        """Its ``recall`` section says how long a chunk is and when to look ahead."""

    def recall(self, streams: "Sequence[Stream]", texts: Sequence[Text], *, wait: bool | None = None) -> list[Recalled]:
        """Choose and deliver memories for each stream; see `m3runtime.runtime.Runtime.recall`."""

    def hint(self, streams: "Sequence[Stream]", texts: Sequence[Text]) -> None:
        """Prefetch for each stream; see `m3runtime.runtime.Runtime.hint`."""

    def release(self, stream: "Stream") -> None:
        """Release everything that a stream holds; see `Stream.close`."""


class Stream:
    """Recalls memories for one sequence. One thread at a time; streams of a runtime are independent.

    A stream that is dropped without `close` gives its leases back when it is collected.
    """

    def __init__(
        self, runtime: Recaller, dtype: torch.dtype, number: int = 0, restriction: Restriction = UNRESTRICTED
    ) -> None:
        self.runtime = runtime
        self.state = StreamState(number, dtype, restriction)
        """The runtime's own."""

    @property
    def number(self) -> int:
        """Tells the streams of a runtime apart, in its timeline."""
        return self.state.number

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that its memories are decoded to."""
        return self.state.dtype

    def recall(self, text: Text, *, wait: bool | None = None) -> Recalled:
        """Choose and deliver the memories for the chunk that has this text. A blank text gets none.

        ``wait``: wait for late blocks? Default: as ``recall.when_late`` says. Raises the typed errors of
        `m3runtime.runtime.Runtime.recall`.
        """
        return self.runtime.recall([self], [text], wait=wait)[0]

    def hint(self, text: Text) -> None:
        """Prefetch the memories that a recall by this text would choose, in the background.

        A newer hint replaces an older one. A hint changes when memories are ready, never which ones are recalled, and
        its errors are counted in the metrics, not raised.
        """
        self.runtime.hint([self], [text])

    def close(self) -> None:
        """Release its memories and drop its hint. Closing twice is fine."""
        self.runtime.release(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
