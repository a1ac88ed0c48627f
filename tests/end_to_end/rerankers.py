"""A reranker that needs no model, reached from configurations by its import path."""

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from m3runtime.retrieval.reranker import Reranker

_WORDS = re.compile(r"\w+")


class SharedWords(Reranker):
    """Counts the words of a text that the question has. ``path`` is ignored."""

    def __init__(self, path: str, *, weight: float = 1.0) -> None:
        self.weight = weight
        self.read: list[tuple[str, str]] = []
        self.closed = 0

    def score(self, question: str, texts: Sequence[str]) -> npt.NDArray[np.float32]:
        self.read += [(question, text) for text in texts]
        asked = set(_WORDS.findall(question.lower()))
        shared = [self.weight * len(asked & set(_WORDS.findall(text.lower()))) for text in texts]
        return np.array(shared, np.float32)

    def close(self) -> None:
        self.closed += 1
