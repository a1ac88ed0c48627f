"""`Recalled`: the memories that a recall delivered; and `StreamState`: what a runtime keeps for one stream."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Self

import torch

from m3runtime.documents.reference import Reference
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import kept
from m3runtime.recall.lease import Lease, Part
from m3runtime.retrieval.match import Match
from m3runtime.retrieval.restriction import UNRESTRICTED, Restriction


@dataclass(frozen=True, slots=True)
class Recalled:
    """The memories that were chosen for a chunk and delivered, best first."""

    ids: tuple[int, ...]
    scores: tuple[float, ...]
    references: tuple[Reference, ...]
    late: tuple[int, ...]
    """Ids that were chosen and not ready by the deadline: see ``recall.when_late``."""
    spec: MemorySpec
    device: torch.device
    dtype: torch.dtype
    parts: tuple[Part, ...] = field(repr=False)
    """One for each id, on the device. Only the CUDA stream that was current at the recall waits until they are ready.

    They count as leased until the stream's next recall; whoever keeps them longer takes memory beyond
    ``recall.decoded``.
    """
    tokens: int
    """Tokens of all memories together, per KV head."""
    log_weights: tuple[float, ...]
    """Added to the attention logits of each memory's keys; zeros if ``recall.score_temperature`` is null."""
    phases: Mapping[str, float] = field(default_factory=dict, repr=False, compare=False)
    """Seconds of each of `m3runtime.observe.metrics.RECALL_PHASES`, for all streams of the call together."""

    def __len__(self) -> int:
        return len(self.ids)

    def layer(self, index: int) -> Part:
        """Keys and values of model layer ``index``, memories in a row: each ``[kv_heads, tokens, head_dim]``.

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

    def kept(self, index: int) -> torch.Tensor:
        """Which of the tokens of `layer` each KV head has, ``bool[kv_heads, tokens]`` on the CPU.

        Others are zeros, and attention must not read them. They exist only with `MemorySpec.budgets`.
        """
        by_memory = [kept(self.spec, keys.shape[2])[self.spec.layers.index(index)] for keys, _ in self.parts]
        return torch.cat([torch.zeros(self.spec.kv_heads, 0, dtype=torch.bool), *by_memory], 1)

    def without_parts(self) -> Self:
        """A record of this recall for later: it keeps no device memory alive."""
        return replace(self, parts=())


@dataclass(eq=False, slots=True)
class StreamState:
    """The leases and debts of one stream. It changes only inside a recall of the stream, or at its end."""

    number: int
    """Tells the streams of a runtime apart."""
    dtype: torch.dtype
    """The dtype that the stream's memories are decoded to."""
    restriction: Restriction = UNRESTRICTED
    """The memories that the stream may read."""
    leases: dict[int, Lease] = field(default_factory=dict)
    """On the memories of the last recall, by id."""
    owed: list[Match] = field(default_factory=list)
    """Matches that were late for the last chunk, for the next one."""
