"""The base of the laws of an index: making one, and brute force in numpy to compare it with."""

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt
import pytest

from m3runtime.memory.block import Ids
from m3runtime.retrieval.embedder import Embeddings
from m3runtime.retrieval.index import Index

Oracle = tuple[npt.NDArray[np.uint64], npt.NDArray[np.float64]]


def unit_vectors(count: int, dim: int, seed: int = 0) -> Embeddings:
    """``float32[count, dim]`` of length 1, in directions that are all equally likely."""
    vectors = np.random.default_rng(seed).standard_normal((count, dim))
    unit: Embeddings = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return unit


def brute_force(ids: Ids, vectors: Embeddings, query: Embeddings) -> Oracle:
    """All ids and their cosine to one query in float64, highest first, equal ones by ascending id."""
    scores = vectors.astype(np.float64) @ query.astype(np.float64)
    order = np.lexsort((ids, -scores))
    return ids[order], scores[order]


class IndexLaws(ABC):
    """The base of the themes that `IndexContract` joins.

    A subclass makes an empty index; all its calls must make equal ones. ``score_tolerance`` is how far a score may lie
    from the exact cosine, for an index that stores rounded vectors.
    """

    dim = 16
    score_tolerance = 1e-5

    @abstractmethod
    def make_index(self) -> Index:
        """An empty index of ``self.dim`` dimensions, whose search is exact at this size."""

    def filled(self, count: int = 50, seed: int = 0) -> tuple[Index, Ids, Embeddings]:
        """An index with ``count`` random vectors, whose ids are neither dense nor in order."""
        ids = np.random.default_rng(seed).permutation(count).astype(np.uint64) * np.uint64(7) + np.uint64(3)
        vectors = unit_vectors(count, self.dim, seed)
        index = self.make_index()
        index.add(ids, vectors)
        return index, ids, vectors

    def assert_agrees(self, index: Index, ids: Ids, vectors: Embeddings, k: int) -> None:
        """Assert that a search agrees with brute force over ``ids`` and ``vectors``."""
        queries = unit_vectors(8, self.dim, seed=99)
        found, scores = index.search(queries, k)
        assert found.dtype == np.uint64
        assert scores.dtype == np.float32
        assert found.shape == scores.shape == (len(queries), min(k, len(ids)))
        for row, query in enumerate(queries):
            all_ids, all_scores = brute_force(ids, vectors, query)
            own = dict(zip(all_ids.tolist(), all_scores.tolist(), strict=True))
            assert len(set(found[row].tolist())) == found.shape[1]
            for place, (id, score) in enumerate(zip(found[row].tolist(), scores[row].tolist(), strict=True)):
                assert score == pytest.approx(own[id], abs=self.score_tolerance)
                # Rounding may swap neighbours, but never one for something that is clearly farther.
                assert own[id] == pytest.approx(all_scores[place], abs=2 * self.score_tolerance)
            assert (np.diff(scores[row]) <= 0).all()
            assert (np.abs(scores[row]) <= 1).all()
