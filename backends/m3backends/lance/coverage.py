"""`Covering`: which rows of a version its index covers; the others' embeddings are held in memory."""

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from m3backends.lance.reader import as_vectors
from m3backends.lance.snapshot import Snapshot
from m3runtime.memory.block import Found, Ids, as_ids
from m3runtime.retrieval.embedder import Embeddings
from m3runtime.storage.tier import Scores

NAME = "embedding_idx"

_FRAGMENT = 32
"""Bits of a row's address below the number of its fragment."""

Key = tuple[int, str | None]
"""A fragment and the file of its deletions: with both equal, it has the same rows."""


@dataclass(frozen=True, slots=True)
class Coverage:
    """The state of one version's index."""

    version: int
    parts: frozenset[str]
    """The index's parts; empty without an index."""
    lists: int
    """About the number of its lists."""
    rest: "tuple[Ids, Embeddings] | None"
    """The ids that it does not cover, and their embeddings at length 1; None if they are too many for memory."""

    def nearest(self, vector: Embeddings, held: Ids, wanted: int) -> tuple[Ids, Scores]:
        """The nearest of the uncovered ids that are held, and their cosines, in no order."""
        if self.rest is None or not len(self.rest[0]):
            return as_ids(()), np.zeros(0, np.float32)
        ids, vectors = self.rest
        own = held[np.minimum(np.searchsorted(held, ids), len(held) - 1)] == ids
        ids, scores = ids[own], (vectors @ (vector / max(float(np.linalg.norm(vector)), 1e-30)))[own]
        if len(ids) > wanted:
            best = scores >= np.partition(scores, -wanted)[-wanted]  # with all that are as near as the last
            ids, scores = ids[best], scores[best]
        return ids, scores


class Covering:
    """The coverage of versions. Keeps what two versions have in common. Thread-safe.

    With ``map_rows`` it maps row ids to ids as well, 16 bytes for each reference: a search that asks for row ids and
    distances alone reads no row.
    """

    def __init__(self, most: int, *, map_rows: bool) -> None:
        """``most`` is the number of references whose embeddings are held in memory."""
        self._most = most
        self._last: Coverage | None = None
        self._loose: dict[Key, tuple[Ids, Embeddings]] = {}
        self._map_rows = map_rows
        self._known = frozenset[int]()
        self._map: tuple[npt.NDArray[np.int64], Ids] = np.zeros(0, np.int64), as_ids(())
        """Row ids, ascending, and the id in each row."""
        self._lock = threading.Lock()

    def of(self, snapshot: Snapshot) -> Coverage:
        """The coverage of a version. The first call for a version reads what is new in it."""
        with self._lock:
            if self._last is None or self._last.version != snapshot.version:
                self._last = self._read(snapshot)
            return self._last

    def ids_of(self, rows: npt.NDArray[np.integer]) -> tuple[Ids, Found]:
        """The ids in rows of a version that `of` was called for, and which rows are known: its own are."""
        known, ids = self._map
        if not len(known):
            return np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.bool_)
        at = np.minimum(np.searchsorted(known, rows), len(known) - 1)
        return ids[at], known[at] == rows

    def _read(self, snapshot: Snapshot) -> Coverage:
        index = index_of(snapshot.dataset)
        fragments = snapshot.dataset.get_fragments()
        if self._map_rows:
            self._learn(snapshot, fragments)
        return Coverage(
            version=snapshot.version,
            parts=frozenset(str(part.uuid) for part in index.segments) if index else frozenset(),
            lists=math.isqrt(index.num_rows_indexed) if index else 0,
            rest=self._rest(snapshot, uncovered(snapshot.dataset, index)),
        )

    def _rest(self, snapshot: Snapshot, fragments: Sequence[Any]) -> tuple[Ids, Embeddings] | None:
        if snapshot.dim is None:
            return as_ids(()), np.zeros((0, 0), np.float32)
        if sum(one.metadata.physical_rows for one in fragments) > self._most and self._most < (
            snapshot.dataset.scanner(filter="id is not null", fragments=fragments).count_rows()
        ):
            self._loose = {}
            return None
        keys = {one.fragment_id: _key(one) for one in fragments}
        new = [one for one in fragments if keys[one.fragment_id] not in self._loose]
        loose = {key: self._loose[key] for key in keys.values() if key in self._loose}
        if new:
            found = snapshot.table("id is not null", ["id", "embedding"], fragments=new, with_row_address=True)
            numbers, ids = found["_rowaddr"].to_numpy() >> _FRAGMENT, found["id"].to_numpy()
            vectors = _of_length_one(as_vectors(found["embedding"], snapshot.dim))
            for one in new:
                own = numbers == one.fragment_id
                loose[keys[one.fragment_id]] = ids[own], vectors[own]
        ids = np.concatenate([as_ids(()), *(ids for ids, _ in loose.values())])
        vectors = np.concatenate([np.zeros((0, snapshot.dim), np.float32), *(rows for _, rows in loose.values())])
        start = 0
        for key, (own, _) in loose.items():  # a part of the whole instead of a copy
            loose[key] = ids[start : start + len(own)], vectors[start : start + len(own)]
            start += len(own)
        self._loose = loose
        return ids, vectors

    def _learn(self, snapshot: Snapshot, fragments: Sequence[Any]) -> None:
        """Map the rows of fragments that are new."""
        new = [one for one in fragments if one.fragment_id not in self._known]
        self._known = frozenset(one.fragment_id for one in fragments)
        if not new:
            return
        found = snapshot.table("id is not null", ["id"], fragments=new, with_row_id=True, use_scalar_index=False)
        rows = np.concatenate([self._map[0], found["_rowid"].to_numpy().astype(np.int64)])
        ids = np.concatenate([self._map[1], found["id"].to_numpy()])
        if not (rows[1:] > rows[:-1]).all():
            rows, first = np.unique(rows, return_index=True)
            ids = ids[first]
        self._map = rows, ids


def index_of(dataset: Any) -> Any:
    """The description of a version's index, or None."""
    return next((one for one in dataset.describe_indices() if one.name == NAME), None)


def uncovered(dataset: Any, index: Any) -> list[Any]:
    """The fragments of a version that this index, or None, does not cover."""
    covered = {number for part in index.segments for number in part.fragment_ids} if index else set[int]()
    return [one for one in dataset.get_fragments() if one.fragment_id not in covered]


def _key(fragment: Any) -> Key:
    deleted = fragment.metadata.deletion_file
    return fragment.fragment_id, None if deleted is None else str(deleted.path(fragment.fragment_id))


def _of_length_one(vectors: Embeddings) -> Embeddings:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.finfo(np.float32).tiny), np.float32)
