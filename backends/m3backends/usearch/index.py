"""`UsearchIndex`: cosine search by usearch, exact while small and HNSW beyond."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from usearch.index import BatchMatches
from usearch.index import Index as NativeIndex

from m3runtime.errors import ConfigError, IndexFileError, InputError
from m3runtime.memory.block import Ids, distinct
from m3runtime.retrieval.embedder import Embeddings
from m3runtime.retrieval.index import Index

DTYPES = ("f32", "f16", "bf16", "i8")
_LARGEST_DIM = 1 << 20
# usearch keeps the key 2**64-1 for itself and would lose that id in silence. Flipping bits moves the gap
# from an id at the edge, which a caller may think of, to one in the middle of nowhere.
_FLIP = np.uint64(0x9E3779B97F4A7C15)
_RESERVED = np.uint64(2**64 - 1) ^ _FLIP

_COMPARED_BYTES = 1 << 24
"""Bytes of vectors that a search among ids reads at a time."""
_FEW = 256
"""So many nearest vectors of all are looked through for those that pass, or a 64th of all."""

Scores = npt.NDArray[np.float32]


class UsearchIndex(Index):
    """An `Index` over usearch.

    Up to ``exact_below`` vectors every search compares all of them. Beyond that it follows the HNSW graph, which may
    miss a neighbour and, among equal scores at the end of a row, keep any. ``dtype`` is the stored type: scores differ
    from float32 cosine by up to 1e-3 with ``f16``, 1e-2 with ``bf16`` and 0.05 with ``i8``. ``connectivity``,
    ``expansion_add`` and ``expansion_search`` are HNSW's M, efConstruction and ef. ``threads`` is the number of cores
    for a search of several vectors, 0 for all; one vector is searched on one core.

    The id 7046029254386353130 cannot be held (usearch reserves one key). Thread-safe: one call at a time. Raises
    `ConfigError` for invalid options, and `InputError` for vectors of another dim or that are not finite.
    """

    def __init__(
        self,
        *,
        dim: int,
        dtype: str = "f16",
        exact_below: int = 4096,
        connectivity: int = 16,
        expansion_add: int = 128,
        expansion_search: int = 64,
        threads: int = 0,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"index dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
        too_few = min(exact_below, threads) < 0 or min(expansion_add, expansion_search) < 1 or connectivity < 2
        if too_few or not 1 <= dim <= _LARGEST_DIM:
            raise ConfigError(
                "index: dim, expansion_add and expansion_search must be at least 1, connectivity at least 2, "
                f"dim at most {_LARGEST_DIM}, exact_below and threads not negative"
            )
        self.dim = dim
        self.dtype = dtype
        self.exact_below = exact_below
        self.threads = threads
        self._options: dict[str, Any] = {
            "ndim": dim,
            "dtype": dtype,
            "metric": "cos",
            "connectivity": connectivity,
            "expansion_add": expansion_add,
            "expansion_search": expansion_search,
        }
        self._native = NativeIndex(**self._options)
        self._lock = threading.Lock()

    def add(self, ids: Ids, vectors: Embeddings) -> None:
        """Add ``float32[n, dim]``; an id that is held already, or twice in ``ids``, is passed over."""
        vectors = self._checked(vectors)
        if ids.shape != vectors.shape[:1]:
            raise InputError(f"index: {len(ids)} ids for {len(vectors)} vectors")
        if (ids == _RESERVED).any():
            raise InputError(f"index: id {_RESERVED} cannot be held")
        keys, first = np.unique(ids.astype(np.uint64) ^ _FLIP, return_index=True)
        with self._lock:
            new = ~np.asarray(self._native.contains(keys), np.bool_) if len(keys) else np.zeros(0, np.bool_)
            if new.any():
                self._native.add(keys[new], vectors[first[new]])

    def remove(self, ids: Ids) -> None:
        """Remove ids; unknown ones are passed over. The space is used again by later vectors."""
        keys = distinct(ids.astype(np.uint64)) ^ _FLIP
        if len(keys):
            with self._lock:
                self._native.remove(keys[np.asarray(self._native.contains(keys), np.bool_)])

    def search(self, vectors: Embeddings, k: int) -> tuple[npt.NDArray[np.uint64], Scores]:
        """The nearest ``min(k, len(self))`` to each row of ``float32[n, dim]``: ids and scores."""
        if k < 0:
            raise InputError(f"index: k must not be negative, not {k}")
        vectors = self._checked(vectors)
        with self._lock:
            size = len(self._native)
            wanted = min(k, size)
            if not wanted or not len(vectors):
                shape = (len(vectors), wanted)
                return np.zeros(shape, np.uint64), np.zeros(shape, np.float32)
            # One more than asked for tells whether the last score is shared by ids that were left out.
            ids, scores = self._nearest(vectors, min(wanted + 1, size), size)
            if size <= self.exact_below and ids.shape[1] > wanted:
                tied = scores[:, wanted] == scores[:, wanted - 1]
                if tied.any():
                    more_ids, more_scores = self._nearest(vectors[tied], size, size)
                    ids[tied], scores[tied] = more_ids[:, : wanted + 1], more_scores[:, : wanted + 1]
        return ids[:, :wanted], scores[:, :wanted]

    def search_among(self, ids: Ids, vectors: Embeddings, k: int) -> tuple[npt.NDArray[np.uint64], Scores]:
        """`search` over these ids alone, exactly.

        Where many of all ids pass, all vectors are compared and the first of them that pass are kept, if there are
        enough. Otherwise those of the ids are compared in float32, some at a time.
        """
        if k < 0:
            raise InputError(f"index: k must not be negative, not {k}")
        vectors = self._checked(vectors)
        if not (len(ids) and k and len(vectors)):
            with self._lock:
                held = int(np.asarray(self._native.contains(ids ^ _FLIP)).sum()) if len(ids) else 0
            shape = (len(vectors), min(k, held))
            return np.zeros(shape, np.uint64), np.zeros(shape, np.float32)
        with self._lock:
            found = self._first_passing(ids, vectors, k)
            return self._compared(ids, vectors, k) if found is None else found

    def _first_passing(self, ids: Ids, vectors: Embeddings, k: int) -> "tuple[npt.NDArray[np.uint64], Scores] | None":
        """The nearest of these ids among the nearest of all, or None if too few of them are there."""
        size = len(self._native)
        count = size and min(size, 64 + 2 * k * -(-size // len(ids)))
        if not count or count > max(_FEW, size // 64):
            return None
        found, scores = self._nearest(vectors, count, size, exact=True)
        passes = ids[np.minimum(np.searchsorted(ids, found), len(ids) - 1)] == found
        # The k-th must be nearer than the last of all, which others may be as near as that were left out.
        if (passes & (scores > scores[:, -1:])).sum(axis=1).min() < k:
            return None
        order = np.argsort(~passes, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(found, order, 1), np.take_along_axis(scores, order, 1)

    def _compared(self, ids: Ids, vectors: Embeddings, k: int) -> tuple[npt.NDArray[np.uint64], Scores]:
        """The nearest of these ids by comparing all of them."""
        unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        best: npt.NDArray[np.uint64] = np.zeros((len(vectors), 0), np.uint64)
        best_scores: Scores = np.zeros((len(vectors), 0), np.float32)
        step = max(1, _COMPARED_BYTES // (4 * self.dim))
        for start in range(0, len(ids), step):
            some = ids[start : start + step]
            some = some[np.asarray(self._native.contains(some ^ _FLIP), np.bool_)]
            if len(some):
                held = np.asarray(self._native.get(some ^ _FLIP, dtype="f32"), np.float32)
                held /= np.maximum(np.linalg.norm(held, axis=1, keepdims=True), np.finfo(np.float32).tiny)
                more = np.broadcast_to(some, (len(vectors), len(some)))
                scores = np.concatenate([best_scores, np.clip(unit @ held.T, -1, 1)], axis=1)
                among = np.concatenate([best, more], axis=1)
                order = np.lexsort((among, -scores))[:, :k]
                best, best_scores = np.take_along_axis(among, order, 1), np.take_along_axis(scores, order, 1)
        return best, best_scores

    def _nearest(
        self, vectors: Embeddings, count: int, size: int, *, exact: bool = False
    ) -> tuple[npt.NDArray[np.uint64], Scores]:
        exact = exact or size <= self.exact_below
        found = self._native.search(vectors, count, exact=exact, threads=self.threads)
        complete = found.counts.min() if isinstance(found, BatchMatches) else len(found)
        if complete < count and not exact:
            # HNSW may reach fewer, for example when ``count`` comes near to all there are.
            found = self._native.search(vectors, count, exact=True, threads=self.threads)
        keys: npt.NDArray[np.uint64] = np.atleast_2d(np.asarray(found.keys, np.uint64))
        ids = keys ^ _FLIP
        scores = np.clip(1 - np.atleast_2d(found.distances), -1, 1).astype(np.float32)
        order = np.lexsort((ids, -scores))
        return np.take_along_axis(ids, order, 1), np.take_along_axis(scores, order, 1)

    def ids(self) -> Ids:
        """All ids held, ascending."""
        with self._lock:
            keys = np.asarray(self._native.keys[:], np.uint64)
        return np.sort(keys ^ _FLIP)

    def __len__(self) -> int:
        with self._lock:
            return len(self._native)

    def save(self, path: Path) -> None:
        """Write the index into a file, as `Index.save` says. Other calls wait until it is written."""
        try:
            with self._lock:
                self._native.save(path)
        except RuntimeError as error:  # so usearch reports a full drive
            raise IndexFileError(f"cannot write index {path}: {error}") from error

    def load(self, data: memoryview) -> None:
        """Load a copy of the bytes that `save` wrote, as `Index.load` says."""
        native = NativeIndex(**self._options)
        shape = (native.ndim, native.dtype)
        try:
            native.load(data)
        except RuntimeError as error:
            raise IndexFileError(f"this usearch cannot read the index: {error}") from error
        if (native.ndim, native.dtype) != shape:
            raise IndexFileError(f"the index is of dim {native.ndim} and dtype {native.dtype}, not {shape}")
        with self._lock:
            self._native = native

    def _checked(self, vectors: Embeddings) -> Embeddings:
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise InputError(f"index: vectors of shape {vectors.shape}, not [n, {self.dim}]")
        if not np.isfinite(vectors).all():
            raise InputError("index: a vector is not finite")
        return np.ascontiguousarray(vectors, np.float32)
