"""Embedders with one mistake each."""

import secrets
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import pytest

from m3runtime.retrieval.embedder import Embeddings
from m3runtime.testing.embedder import EmbedderContract, MakeEmbedder
from tests.end_to_end.embedders import HashedWords
from tests.testing.broken.suites import make_suites


class NotOfLengthOne(HashedWords):
    def embed_queries(self, texts: Sequence[str]) -> Embeddings:
        return super().embed_queries(texts) * np.float32(0.999)


class DependsOnTheBatch(HashedWords):
    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        vectors = super().embed_references(texts)
        if len(vectors) > 1:
            vectors = vectors - 0.01 * vectors.mean(0)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


class SortsByLength(HashedWords):
    """Batches texts of like length, and forgets to put the rows back."""

    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        return super().embed_references(sorted(texts, key=len))


class GivesItsOwnCache(HashedWords):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.known: dict[tuple[str, ...], Embeddings] = {}

    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        key = tuple(texts)
        if key not in self.known:
            self.known[key] = super().embed_references(texts)
        return self.known[key]


class ABlankTextHasNoDirection(HashedWords):
    def embed_references(self, texts: Sequence[str]) -> Embeddings:
        vectors = super().embed_references(texts)
        vectors[[not text.strip() for text in texts]] = 0
        return vectors


class ItsFingerprintIsItsOwn(HashedWords):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.own = secrets.token_hex(16)

    @property
    def fingerprint(self) -> str:
        return self.own


class Embedders(EmbedderContract):
    kind: ClassVar[type[HashedWords]]

    @pytest.fixture(scope="class")
    @classmethod
    def make_embedder(cls) -> MakeEmbedder:
        return lambda: cls.kind("words")


BROKEN = HashedWords.__subclasses__()
globals().update(make_suites(Embedders, __name__, HashedWords, BROKEN))
