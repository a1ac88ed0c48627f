"""`Grounding`: the memories that each token of an answer was read from, by the model's own attention.

A recall says which memories the model could read. Attention says which it did read: the share of a token's attention
that the keys of a memory got, the mean over query heads and some layers, which the engine chooses. The rest went to
the sink and the context.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean


@dataclass(frozen=True, slots=True)
class Span:
    """A part of an answer that was read from one memory more than from any other."""

    start: int
    end: int
    """Places in the answer's text."""
    id: int
    """The memory."""
    share: float
    """The mean share of attention that the span's tokens gave to it, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class Grounding:
    """The shares of attention of each token of an answer, a stop token left out."""

    ends: tuple[int, ...]
    """The place in the answer's text where each token's text ends. A part of a character has no text yet."""
    shares: tuple[Mapping[int, float], ...]
    """Memory id to share, in [0, 1], for each token and all memories that it could read."""

    @property
    def memories(self) -> Mapping[int, float]:
        """The mean share of each memory over all tokens."""
        ids = dict.fromkeys(id for token in self.shares for id in token)
        return {id: fmean(token.get(id, 0.0) for token in self.shares) for id in ids}

    @property
    def leader(self) -> int | None:
        """The memory with the greatest mean share; None if there was none to read."""
        memories = self.memories
        return max(memories, key=memories.__getitem__, default=None)

    @property
    def lead(self) -> float:
        """The part that the leader has of the attention to all memories, in [0, 1]; 0 if there was none to read.

        It is small where no memory has what was asked for, and attention looks for it in all of them. The share of all
        memories together does not show that: it is rather higher then.
        """
        memories = self.memories
        return max(memories.values(), default=0.0) / (sum(memories.values()) or 1.0)

    @property
    def share(self) -> float:
        """The mean share of all memories together; 0 for an answer without tokens."""
        return fmean(sum(token.values()) for token in self.shares) if self.shares else 0.0

    def part(self, start: int, end: int) -> "Grounding":
        """The grounding of the tokens whose text ends after ``start``, and not after ``end``."""
        tokens = [token for token, place in enumerate(self.ends) if start < place <= end]
        return Grounding(tuple(self.ends[i] for i in tokens), tuple(self.shares[i] for i in tokens))

    def spans(self, least: float) -> tuple[Span, ...]:
        """The spans of consecutive tokens with the same leading memory, if its mean share is at least ``least``."""
        leading = [max(token, key=token.__getitem__) if token else None for token in self.shares]
        found = []
        for id, group in groupby(range(len(leading)), key=leading.__getitem__):
            tokens = list(group)
            start = self.ends[tokens[0] - 1] if tokens[0] else 0
            end = self.ends[tokens[-1]]
            if id is None or start == end:
                continue
            share = fmean(self.shares[token][id] for token in tokens)
            if share >= least:
                found.append(Span(start, end, id, share))
        return tuple(found)
