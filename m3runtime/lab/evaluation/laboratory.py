"""`Laboratory`: delivers the memories that an experiment chose, in the place of a `Runtime`, which searches."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from m3runtime.config.schema import Config
from m3runtime.documents.reference import Reference
from m3runtime.memory.spec import MemorySpec
from m3runtime.recall.lease import Part
from m3runtime.recall.recalled import Recalled
from m3runtime.retrieval.match import Match
from m3runtime.retrieval.query import Query, Text
from m3runtime.retrieval.retriever import log_weights
from m3runtime.stream import Stream


@dataclass(frozen=True, slots=True)
class Choice:
    """A memory to deliver for a text."""

    id: int
    score: float
    log_weight: float = 0.0


def weighted(matches: Sequence[Match], temperature: float | None) -> list[Choice]:
    """The choice of these matches, weighted as ``recall.score_temperature`` says."""
    weights = log_weights(matches, temperature)
    return [Choice(match.id, match.score, weight) for match, weight in zip(matches, weights, strict=True)]


class Laboratory:
    """Delivers decoded memories from RAM, as chosen for each text. A `Recaller`; thread-safe."""

    def __init__(
        self,
        config: Config,
        spec: MemorySpec,
        parts: Mapping[int, Part],
        references: Mapping[int, Reference],
        choices: Mapping[str, Sequence[Choice]],
    ) -> None:
        """``choices`` maps the query text of a chunk to its memories; any other text gets none."""
        self.config = config
        self.spec = spec
        self.parts = parts
        self.references = references
        self.choices = choices

    def stream(self, dtype: torch.dtype) -> Stream:
        """A new stream; see `m3runtime.runtime.Runtime.stream`."""
        return Stream(self, dtype)

    def recall(self, streams: Sequence[Stream], texts: Sequence[Text], *, wait: bool | None = None) -> list[Recalled]:  # noqa: ARG002 - nothing is late
        """Deliver the memories that were chosen for these texts."""
        found = [self.choices.get(Query.of(text).text, ()) for text in texts]
        return [self._recalled(stream, choices) for stream, choices in zip(streams, found, strict=True)]

    def hint(self, streams: Sequence[Stream], texts: Sequence[Text]) -> None:
        """Do nothing: all memories are in RAM."""

    def release(self, stream: Stream) -> None:
        """Do nothing: a stream holds no resources."""

    def _recalled(self, stream: Stream, choices: Sequence[Choice]) -> Recalled:
        parts = tuple(self.parts[choice.id] for choice in choices)
        return Recalled(
            ids=tuple(choice.id for choice in choices),
            scores=tuple(choice.score for choice in choices),
            references=tuple(self.references[choice.id] for choice in choices),
            late=(),
            spec=self.spec,
            device=parts[0][0].device if parts else torch.device("cpu"),
            dtype=stream.dtype,
            parts=parts,
            tokens=sum(keys.shape[2] for keys, _ in parts),
            log_weights=tuple(choice.log_weight for choice in choices),
        )
