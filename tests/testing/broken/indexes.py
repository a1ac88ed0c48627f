"""Indexes with one mistake each."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from m3backends.usearch.index import UsearchIndex
from m3runtime.errors import IndexFileError
from m3runtime.memory.block import Ids
from m3runtime.retrieval.embedder import Embeddings
from m3runtime.retrieval.index import Index
from m3runtime.testing.index import IndexContract
from tests.testing.broken.suites import make_suites


class FindsWhatWasRemoved(UsearchIndex):
    def remove(self, ids: Ids) -> None:
        super().remove(ids[:-1] if len(ids) > 1 else ids)


class FarthestFirst(UsearchIndex):
    def search(self, vectors: Embeddings, k: int) -> Any:
        ids, scores = super().search(vectors, k)
        return ids[:, ::-1], scores[:, ::-1]


class LooksAtAllAndFiltersAfterwards(UsearchIndex):
    def search_among(self, ids: Ids, vectors: Embeddings, k: int) -> Any:
        found, scores = self.search(vectors, k)
        width = int(np.isin(found, ids).sum(axis=1).min(initial=found.shape[1]))
        kept = np.argsort(~np.isin(found, ids), axis=1, kind="stable")[:, :width]
        return np.take_along_axis(found, kept, 1), np.take_along_axis(scores, kept, 1)


class KeepsWhatItHeldBeforeLoading(UsearchIndex):
    def load(self, data: memoryview) -> None:
        held = self.ids()
        vectors = np.stack([np.eye(self.dim, dtype=np.float32)[id % self.dim] for id in held.tolist()] or [[]])
        super().load(data)
        if len(held):
            self.add(held, vectors)


class WhatItCannotLoadIsAnEmptyIndex(UsearchIndex):
    def load(self, data: memoryview) -> None:
        try:
            super().load(data)
        except IndexFileError:
            self.remove(self.ids())


class AppendsToTheFile(UsearchIndex):
    def save(self, path: Path) -> None:
        before = path.read_bytes() if path.exists() else b""
        super().save(path)
        path.write_bytes(path.read_bytes() + before)


class TheLastVectorWins(UsearchIndex):
    def add(self, ids: Ids, vectors: Embeddings) -> None:
        self.remove(ids)
        super().add(ids, vectors)


class SignedOrderOfTies(UsearchIndex):
    def search(self, vectors: Embeddings, k: int) -> Any:
        ids, scores = super().search(vectors, k)
        order = np.lexsort((-ids.astype(np.int64), -scores))
        return np.take_along_axis(ids, order, 1), scores


class DotProductsBeyondOne(UsearchIndex):
    def search(self, vectors: Embeddings, k: int) -> Any:
        ids, scores = super().search(vectors, k)
        return ids, scores * np.float32(1.001)


class Indexes(IndexContract):
    kind: ClassVar[type[UsearchIndex]]

    def make_index(self) -> Index:
        return self.kind(dim=self.dim, dtype="f32")


BROKEN = UsearchIndex.__subclasses__()
globals().update(make_suites(Indexes, __name__, UsearchIndex, BROKEN))
