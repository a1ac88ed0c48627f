"""`Stream`: one sequence being decoded, and the memories it holds now."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from m3runtime.documents.reference import Reference
from m3runtime.memory.spec import MemorySpec
from m3runtime.retrieval.retriever import Match

if TYPE_CHECKING:
    from m3runtime.config.schema import Config

Part = tuple[Tensor, Tensor]
"""Keys and values of one memory, each ``[layers, kv_heads, tokens, head_dim]``."""


@dataclass(frozen=True, slots=True)
class Recalled:
    """The memories chosen for a chunk and delivered, best first."""

    ids: tuple[int, ...]
    scores: tuple[float, ...]
    references: tuple[Reference, ...]
    late: tuple[int, ...]
    """Chosen, but not there by the deadline: see ``recall.when_late``."""
    spec: MemorySpec
    device: torch.device
    dtype: torch.dtype
    parts: tuple[Part, ...] = field(repr=False)
    """One for each id, on the device."""
    log_weights: tuple[float, ...]
    """What attention adds to the logits of each memory's keys; zeros if ``recall.score_temperature`` is null."""
    stages: Mapping[str, float] = field(default_factory=dict, repr=False, compare=False)
    """Seconds of each of `m3runtime.observe.metrics.RECALL_STAGES`, of all streams that recalled together."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def tokens(self) -> int:
        """Tokens of all memories together, per KV head."""
        return sum(keys.shape[2] for keys, _ in self.parts)

    def layer(self, index: int) -> Part:
        """Keys and values of layer ``index``, memories one after the other: ``[kv_heads, tokens, head_dim]``.

        Raises `KeyError` if that is no memory layer.
        """
        if index not in self.spec.layers:
            raise KeyError(f"layer {index} is no memory layer; those are {self.spec.layers}")
        at = self.spec.layers.index(index)
        if not self.parts:
            nothing = torch.zeros(self.spec.kv_heads, 0, self.spec.head_dim, dtype=self.dtype, device=self.device)
            return nothing, nothing
        return (
            torch.cat([keys[at] for keys, _ in self.parts], dim=1),
            torch.cat([values[at] for _, values in self.parts], dim=1),
        )


class Recaller(Protocol):
    """What streams recall through: a `Runtime`, or what stands in for one in an experiment."""

    @property
    def config(self) -> "Config":
        """Its ``recall`` section says how long a chunk is and when to look ahead."""

    def recall(self, streams: "Sequence[Stream]", texts: Sequence[str], *, wait: bool | None = None) -> list[Recalled]:
        """See `m3runtime.runtime.Runtime.recall`."""

    def hint(self, streams: "Sequence[Stream]", texts: Sequence[str]) -> None:
        """See `m3runtime.runtime.Runtime.hint`."""

    def release(self, stream: "Stream") -> None:
        """See `Stream.close`."""


class Stream:
    """Recalls memories for one sequence. One thread at a time; streams of a runtime are independent."""

    def __init__(self, runtime: Recaller, dtype: torch.dtype, number: int = 0) -> None:
        self.runtime = runtime
        self.dtype = dtype
        self.number = number
        """Tells the streams of a runtime apart."""
        self.held: dict[int, Part] = {}
        """Decoded memories of the last recall; an id that is recalled again is not decoded again."""
        self.owed: list[Match] = []
        """Late for the last chunk, to be given to the next one."""

    def recall(self, text: str, *, wait: bool | None = None) -> Recalled:
        """Choose and deliver the memories for the chunk whose text this is.

        ``wait`` is whether to wait for late blocks; None does as ``recall.when_late`` says.
        """
        return self.runtime.recall([self], [text], wait=wait)[0]

    def hint(self, text: str) -> None:
        """Say what the next chunk's text will be, about: its memories are found, read and decoded in the background.

        A newer hint takes the place of an older one. What is recalled does not depend on hints, only when it is there.
        """
        self.runtime.hint([self], [text])

    def close(self) -> None:
        """Hold nothing any more. Closing twice is fine."""
        self.runtime.release(self)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
