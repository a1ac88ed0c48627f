"""`UsearchIndex`: cosine search by usearch, exact while small and HNSW beyond.

The file that `UsearchIndex.save` writes is usearch's own, followed by a trailer:

====================  =========================================================
bytes                 field
====================  =========================================================
as usearch wrote      the index
``n``                 JSON: stamp, dim, dtype and number of vectors
8                     ``n``, little-endian
8                     magic and format version, ``M3INDEX1``
16                    XXH3-128 of everything before
====================  =========================================================

usearch trusts what it reads, so it is given a file only after the digest of the whole file was found right, and all
that it follows in it too (`m3backends.usearch.layout`): whoever wrote the file can compute a digest. What the digest
does not prove is that vectors are the home's; whoever can write a bank's files can write the bank.
"""

import json
import mmap
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash
from usearch.index import BatchMatches
from usearch.index import Index as NativeIndex

from m3backends.usearch.layout import problem
from m3runtime.errors import ConfigError, IndexFileError, InputError
from m3runtime.memory.block import Ids
from m3runtime.memory.spec import canonical_json
from m3runtime.retrieval.embedder import Embeddings
from m3runtime.retrieval.index import Index
from m3runtime.storage.files import open_regular, write_atomically

DTYPES = ("f32", "f16", "bf16", "i8")
MAGIC = b"M3INDEX1"
_TAIL_BYTES = 8 + len(MAGIC) + 16
_PIECE = 1 << 24
_MOST_DIM = 1 << 20
_MOST_ABOUT = 1 << 16
"""Bytes of JSON at most."""
# usearch keeps the key 2**64-1 for itself and would lose that id in silence. Flipping bits moves the gap
# from an id at the edge, which a caller may think of, to one in the middle of nowhere.
_FLIP = np.uint64(0x9E3779B97F4A7C15)
_RESERVED = np.uint64(2**64 - 1) ^ _FLIP

Scores = npt.NDArray[np.float32]


class UsearchIndex(Index):
    """An `Index` over usearch.

    Up to ``exact_below`` vectors every search looks at all of them; from there on it follows the HNSW
    graph, which may pass over a neighbour and, among equal scores at the end of a row, keep any. ``dtype``
    is what vectors are stored in: scores differ from float32 cosine by up to 1e-3 with ``f16``, 1e-2 with
    ``bf16`` and 0.05 with ``i8``. ``connectivity``, ``expansion_add`` and ``expansion_search`` are HNSW's
    M, efConstruction and ef. ``threads`` is how many cores a search of several vectors takes, 0 for all; one vector is
    searched on one.

    The id 7046029254386353130 cannot be held (usearch keeps one key for itself). Thread-safe: one call at a
    time. Raises `ConfigError` for options that make no index, and
    `InputError` for vectors of another dim or that are not finite.
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
        if too_few or not 1 <= dim <= _MOST_DIM:
            raise ConfigError(
                "index: dim, expansion_add and expansion_search must be at least 1, connectivity at least 2, "
                f"dim at most {_MOST_DIM}, exact_below and threads not negative"
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
        """Add ``float32[n, dim]``; an id that is there already, or twice in ``ids``, is passed over."""
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
        keys = np.unique(ids.astype(np.uint64)) ^ _FLIP
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

    def _nearest(self, vectors: Embeddings, count: int, size: int) -> tuple[npt.NDArray[np.uint64], Scores]:
        exact = size <= self.exact_below
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

    def save(self, path: Path, stamp: str) -> None:
        """Write one file by temporary file, fsync and rename. Other calls wait until it is written.

        Raises `IndexFileError` if it cannot be written; what was at ``path`` before is then still there.
        """
        try:
            write_atomically(path, lambda temporary: self._write(temporary, stamp))
        except (OSError, RuntimeError) as error:  # usearch reports a full drive as RuntimeError
            raise IndexFileError(f"cannot write index {path}: {error}") from error

    def _write(self, path: Path, stamp: str) -> None:
        with self._lock:
            self._native.save(path)
            count = len(self._native)
        about = {"count": count, "dim": self.dim, "dtype": self.dtype, "stamp": stamp}
        text = canonical_json(about).encode()
        with path.open("r+b") as file:
            digest = xxhash.xxh3_128()
            while piece := file.read(_PIECE):
                digest.update(piece)
            tail = text + len(text).to_bytes(8, "little") + MAGIC
            digest.update(tail)
            file.write(tail + digest.digest())

    def load(self, path: Path, stamp: str) -> None:
        """Replace what is held by what `save` wrote. After `IndexFileError` nothing has changed."""
        try:
            with open_regular(path) as file:
                if os.fstat(file.fileno()).st_size < _TAIL_BYTES:
                    raise IndexFileError(f"{path} is too short for an index")
                # Mapped, so that the bytes that are checked are those that are read, whatever is renamed
                # meanwhile.
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                    native = self._read(memoryview(mapped), path, stamp)
        except OSError as error:
            raise IndexFileError(f"cannot read index {path}: {error.strerror}") from error
        with self._lock:
            self._native = native

    def _read(self, file: memoryview, path: Path, stamp: str) -> NativeIndex:
        """The index of a file, read from its end on: what lies about its size is found out before it is read."""
        with file, file[:-16] as body, file[-16:] as digest:
            if bytes(body[-8:]) != MAGIC:
                raise IndexFileError(f"{path} is damaged or no index of this format version ({MAGIC.decode()})")
            size = int.from_bytes(body[-16:-8], "little")
            end = len(body) - 16 - size
            if end < 0 or size > _MOST_ABOUT:
                raise IndexFileError(f"{path} is damaged or no index: it is too short for what it states")
            about = _about(bytes(body[end:-16]), path)
            for key, mine in (("stamp", stamp), ("dim", self.dim), ("dtype", self.dtype)):
                if about[key] != mine:
                    raise IndexFileError(f"{path} is of another {key}: {str(about[key])[:100]!r} instead of {mine!r}")
            native = NativeIndex(**self._options)
            with body[:end] as own:
                wrong = problem(own, native.save() or b"", count=about["count"], dim=self.dim, dtype=self.dtype)
                if wrong is not None:
                    raise IndexFileError(f"{path} is damaged or cannot be read by this usearch: {wrong}")
                if xxhash.xxh3_128_digest(body) != bytes(digest):
                    raise IndexFileError(f"{path} is damaged: its digest does not match")
                try:
                    native.load(own)
                except RuntimeError as error:
                    raise IndexFileError(f"{path} cannot be read by this usearch: {error}") from error
        if (len(native), native.ndim) != (about["count"], self.dim):
            raise IndexFileError(f"{path} does not hold {about['count']} vectors of {self.dim}, as it states")
        return native

    def _checked(self, vectors: Embeddings) -> Embeddings:
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise InputError(f"index: vectors of shape {vectors.shape}, not [n, {self.dim}]")
        if not np.isfinite(vectors).all():
            raise InputError("index: a vector is not finite")
        return np.ascontiguousarray(vectors, np.float32)


def _about(text: bytes, path: Path) -> dict[str, Any]:
    """What the trailer states. Raises `IndexFileError` unless it is a count, a dim, a dtype and a stamp."""
    try:
        about = json.loads(text)
    except (ValueError, RecursionError):
        about = None
    kinds = {"count": int, "dim": int, "dtype": str, "stamp": str}
    if not isinstance(about, dict) or {key: type(value) for key, value in about.items()} != kinds:
        raise IndexFileError(f"{path} is damaged: what it states of itself cannot be read")
    return about
