"""What scoring held-out passages found."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from statistics import fmean
from typing import Literal

TextMode = Literal["none", "text", "memory"]
MODES: tuple[TextMode, ...] = ("none", "text", "memory")

LogProbs = tuple[tuple[float, ...], ...]
"""Natural logarithms of the probabilities of a passage's scored tokens: ``[chunk][token]``."""


@dataclass(frozen=True, slots=True)
class Recall:
    """What a scored chunk was given, best first."""

    ids: tuple[int, ...]
    scores: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TextResults:
    """What a run found. Passages are in the corpus' order; every one has equally many chunks of equally many tokens."""

    references: int
    """References that the bank holds."""
    dropped: int
    """References that were left out of it because a passage has too much of them."""
    chunk_tokens: int
    log_probs: Mapping[TextMode, tuple[LogProbs, ...]] = field(repr=False)
    """Of each mode, one for each passage; the same tokens in every mode."""
    recalled: tuple[tuple[Recall, ...], ...] = field(repr=False)
    """What ``memory`` read as memories and ``text`` as text: ``[passage][chunk]``."""
    fingerprints: Mapping[str, str] = field(repr=False)
    """Of everything that the bank was made with, by name."""

    @property
    def passages(self) -> int:
        """Passages that were scored."""
        return len(self.recalled)

    @property
    def chunks(self) -> int:
        """Scored chunks of each passage."""
        return len(self.recalled[0])

    def mean(self, mode: TextMode) -> float:
        """Mean log-probability of a token, in nats; ``exp(-mean)`` is the perplexity."""
        return fmean(self.passage_means(mode))

    def passage_means(self, mode: TextMode) -> tuple[float, ...]:
        """The same of each passage: what a bootstrap draws from, as tokens of a passage depend on each other."""
        return tuple(fmean(chain(*passage)) for passage in self.log_probs[mode])

    def chunk_means(self, mode: TextMode) -> tuple[float, ...]:
        """The same of the first chunk after the prompts, the second, and so on."""
        return tuple(fmean(chain(*chunks)) for chunks in zip(*self.log_probs[mode], strict=True))

    def recall_scores(self) -> tuple[float, ...]:
        """The score of everything that was recalled for any chunk."""
        return tuple(score for passage in self.recalled for chunk in passage for score in chunk.scores)
