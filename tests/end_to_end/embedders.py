"""An embedder that needs no model, reached from configurations by its import path."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from zlib import crc32

import numpy as np

from m3runtime.retrieval.embedder import Embedder, Embeddings

_WORDS = re.compile(r"\w+")


class HashedWords(Embedder):
    """Counts words and their beginnings in hashed places: texts that share words are near. ``path`` is ignored."""

    def __init__(self, path: str, *, dim: int = 256, salt: str = "") -> None:
        self._dim = dim
        self._salt = salt

    @classmethod
    def dim_of(cls, path: str, options: Mapping[str, Any]) -> int:
        return int(options.get("dim", 256))

    @property
    def dim(self) -> int:
        return self._dim

    @property
    def fingerprint(self) -> str:
        return f"{self._dim:016x}{crc32(self._salt.encode()):016x}"

    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        vectors = np.zeros((len(texts), self._dim), np.float32)
        for vector, text in zip(vectors, texts, strict=True):
            vector[0] = 0.01  # so that a blank text has a direction
            for part in self._parts(text):
                code = crc32(f"{self._salt}{part}".encode())
                vector[1 + code % (self._dim - 1)] += len(part) if code >> 31 else -len(part)  # long words say more
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def embed_queries(self, texts: Sequence[str]) -> Embeddings:
        return self.embed_references(texts)

    def _parts(self, text: str) -> Iterator[str]:
        for word in _WORDS.findall(text.lower()):
            yield word
            yield word[:5] + "*"
