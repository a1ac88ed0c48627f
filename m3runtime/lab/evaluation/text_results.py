"""`TextResults`: the scores of held-out passages."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean
from typing import Literal

TextMode = Literal["none", "text", "memory"]
MODES: tuple[TextMode, ...] = ("none", "text", "memory")

LogProbs = tuple[tuple[float, ...], ...]
"""Log-probabilities (natural logarithm) of the scored tokens of a passage: ``[chunk][token]``."""


@dataclass(frozen=True, slots=True)
class ChunkRecall:
    """The memories that were recalled for a scored chunk, best first."""

    ids: tuple[int, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TextResults:
    """The results of a run. Passages are in the order of the corpus; all have equally many chunks of equal length."""

    references: int
    """Number of references in the bank."""
    dropped: int
    """Number of references that were left out because they share too much with a passage."""
    chunk_tokens: int
    log_probs: Mapping[TextMode, tuple[LogProbs, ...]] = field(repr=False)
    """For each mode, the log-probabilities of each passage; the tokens are the same in every mode."""
    recalled: tuple[tuple[ChunkRecall, ...], ...] = field(repr=False)
    """Recalled memories, as ``[passage][chunk]``; ``text`` reads the same references as text."""
    fingerprints: Mapping[str, str] = field(repr=False)
    """Fingerprints of everything that the bank was made with, by name."""

    @property
    def passages(self) -> int:
        """Number of scored passages."""
        return len(self.recalled)

    @property
    def chunks(self) -> int:
        """Number of scored chunks of each passage."""
        return len(self.recalled[0])

    def mean(self, mode: TextMode) -> float:
        """Mean log-probability of a token, in nats; ``exp(-mean)`` is the perplexity."""
        return fmean(self.passage_means(mode))

    def passage_means(self, mode: TextMode) -> tuple[float, ...]:
        """The mean of each passage. A bootstrap resamples passages, because their tokens are not independent."""
        return tuple(fmean(chain(*passage)) for passage in self.log_probs[mode])

    def chunk_means(self, mode: TextMode) -> tuple[float, ...]:
        """The mean of the first chunk after the prompt, of the second, and so on, over all passages."""
        return tuple(fmean(chain(*chunks)) for chunks in zip(*self.log_probs[mode], strict=True))

    def recall_scores(self) -> tuple[float, ...]:
        """The scores of all recalled memories of all chunks."""
        return tuple(score for passage in self.recalled for chunk in passage for score in chunk.scores)
