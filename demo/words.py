"""An embedder that needs no model: texts that share words are near."""

from collections.abc import Sequence
from zlib import crc32

import numpy as np

from m3runtime.retrieval.embedder import Embedder, Embeddings


class Words(Embedder):
    """Sums one random direction for each word; all words count alike, since their frequencies are not known."""

    def __init__(self, path: str, *, dim: int = 512) -> None:
        self._dim = dim
        self._name = path
        self._known: dict[str, Embeddings] = {}

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def fingerprint(self) -> str:
        return f"{self._dim:016x}{crc32(self._name.encode()):016x}"

    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        vectors = np.zeros((len(texts), self._dim), np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            vector[0] = 0.01  # so that a blank text has a direction
            for word in set(text.lower().split()):
                vector += self._of(word)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def embed_queries(self, texts: Sequence[str]) -> Embeddings:
        return self.embed_references(texts)

    def _of(self, word: str) -> Embeddings:
        if word not in self._known:
            rng = np.random.default_rng(crc32(word.encode()))
            self._known[word] = rng.standard_normal(self._dim, np.float32) / np.float32(self._dim**0.5)
        return self._known[word]
