"""`Embedder` and `Index` contracts, and the `Retriever` that joins them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from m3runtime.batching import Recent
from m3runtime.block import Ids

Vectors = npt.NDArray[np.float32]

Timed = Callable[[str], AbstractContextManager[object]]
"""Is told that the block is the stage ``embed`` or ``search``."""

_RECENT = 64


class Embedder(ABC):
    """Turns texts into unit vectors whose cosine tells how near they are. Thread-safe, deterministic."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Length of a vector."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Thirty-two hex digits: equal for embedders that give equal vectors."""

    @abstractmethod
    def embed_references(self, texts: Sequence[str]) -> Vectors:
        """``float32[n, dim]``, each row of length 1."""

    @abstractmethod
    def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """``float32[n, dim]``, each row of length 1. Models with an instruction for queries prepend it here."""

    def close(self) -> None:  # noqa: B027 - an embedder that holds nothing needs none
        """Give back what the embedder holds."""


class Index(ABC):
    """Nearest vectors by cosine. A cache of the home's embeddings. Thread-safe."""

    @abstractmethod
    def add(self, ids: Ids, vectors: Vectors) -> None:
        """Add vectors; an id that is there already is passed over."""

    @abstractmethod
    def remove(self, ids: Ids) -> None:
        """Remove ids; unknown ones are passed over."""

    @abstractmethod
    def search(self, vectors: Vectors, k: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32]]:
        """The nearest ``min(k, len(self))`` ids and their scores in [-1, 1] for each row, highest first: ``[n, <=k]``.

        Equal scores come in ascending order of ids.
        """

    @abstractmethod
    def ids(self) -> Ids:
        """All ids held, ascending."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def save(self, path: Path, stamp: str) -> None:
        """Write the index by temporary file and rename; ``stamp`` names the bank and embedder it belongs to."""

    @abstractmethod
    def load(self, path: Path, stamp: str) -> None:
        """Read what `save` wrote. Raises `IndexFileError` if it is absent, damaged, or of another stamp."""


@dataclass(frozen=True, slots=True)
class Match:
    """One memory that was chosen for a chunk."""

    id: int
    score: float


class Retriever:
    """Chooses memories for texts: embeds, searches, applies the score floor and margin.

    ``margin`` leaves out memories whose score lies more than that below the best one's: fewer, better memories beat
    more. Vectors of the last calls are kept: a chunk whose very text was hinted at is not embedded again. Thread-safe.
    """

    def __init__(
        self, embedder: Embedder, index: Index, *, memories: int, min_score: float = -1.0, margin: float | None = None
    ) -> None:
        self.embedder = embedder
        self.index = index
        self.memories = memories
        self.min_score = min_score
        self.margin = margin
        # By all texts of a call: what embedders give may depend, in its last bits, on what stands beside a text.
        self._recent = Recent[tuple[str, ...], Vectors](_RECENT)

    def search(self, texts: Sequence[str], k: int | None = None, timed: Timed = nullcontext) -> list[list[Match]]:
        """Matches of each text, best first; at most ``k`` (default ``memories``). A blank text has none."""
        wanted = self.memories if k is None else k
        asked = [i for i, text in enumerate(texts) if text.strip()]
        matches: list[list[Match]] = [[] for _ in texts]
        if not asked or not wanted or not len(self.index):
            return matches
        wording = tuple(texts[i] for i in asked)
        with timed("embed"):
            vectors = self._recent(wording, lambda: self.embedder.embed_queries(wording))
        with timed("search"):
            ids, scores = self.index.search(vectors, wanted)
        for row, i in enumerate(asked):
            found = [Match(int(id), float(score)) for id, score in zip(ids[row], scores[row], strict=True)]
            matches[i] = passing(found, min_score=self.min_score, margin=self.margin)
        return matches


def passing(matches: Sequence[Match], *, min_score: float, margin: float | None) -> list[Match]:
    """Of matches, best first, those that score at least ``min_score``, and the best one's score less ``margin``."""
    if not matches:
        return []
    floor = min_score if margin is None else max(min_score, matches[0].score - margin)
    return [match for match in matches if match.score >= floor]


def log_weights(matches: Sequence[Match], temperature: float | None) -> tuple[float, ...]:
    """What attention adds to the logits of each memory's keys: ``(score - best score) / temperature``.

    Memories that match less are attended to less; with None, all alike.
    """
    if temperature is None or not matches:
        return (0.0,) * len(matches)
    best = max(match.score for match in matches)
    return tuple((match.score - best) / temperature for match in matches)
