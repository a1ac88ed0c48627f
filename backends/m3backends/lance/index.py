"""`LanceIndex`: nearest-neighbour search by an index of the Lance home's own table, which takes no RAM for vectors."""

import math
import threading
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from m3backends.lance.building import build, plan
from m3backends.lance.coverage import NAME, Coverage, Covering, index_of, uncovered
from m3backends.lance.home import LanceHome
from m3backends.lance.reader import embeddings_of
from m3backends.lance.snapshot import Snapshot
from m3backends.lance.table import LanceTable
from m3runtime.errors import ConfigError, InputError, TierError
from m3runtime.memory.block import Ids, as_ids, distinct, without
from m3runtime.retrieval.embedder import Embeddings
from m3runtime.storage.home import Home
from m3runtime.storage.home_index import HomeIndex
from m3runtime.storage.tier import Scores

_SPARE = 8
"""Rows that are asked for beyond those wanted: some may not be held, others may have equal scores."""
_BATCH = 4096
_REFINE = 4
"""Candidates for each result. In passages embedded by MiniLM 10 found 0.3 % more, and took 1.7 times as long."""
_MOST_BITS = 8
_LEAST_BITS = 384
"""Bits of a whole vector: one for each number of most embedders, and more of those with fewer numbers."""
_PROBES = 6
"""Lists that a search reads, in multiples of the square root of their number."""
_LOOSE = 2
"""Rows that are not in the index and are held in memory, in multiples of ``exact_below``."""
_MOST_PARTS = 8
"""Parts of the index, one for each update, before all is built anew. Lance's own merging lowers recall."""


class LanceIndex(HomeIndex):
    """An index of type IVF_RQ in a Lance home.

    In a folder scores are exact: it has one bit for each number, and the nearest candidates are compared with their
    embeddings. In an object store that would be a request for each candidate, so it has eight bits for each number
    there, and scores are those of the rounded vectors.

    A table of fewer than ``exact_below`` rows has no index. ``probes`` is the number of lists, of about the square root
    of all rows, that a search reads, ``refine`` the number of candidates for each result that are compared exactly, and
    ``bits`` those of each number; None chooses them by the size and the place of the table. ``workers`` processes build
    the index. Rows that the index does not cover are found all the same: up to twice ``exact_below`` of them are held
    in memory. Thread-safe.
    """

    def __init__(
        self,
        *,
        dim: int,
        dtype: Literal["f32", "f16"] = "f16",  # noqa: ARG002 - the home keeps float32
        exact_below: int = 20_000,
        probes: int | None = None,
        refine: int | None = None,
        bits: int | None = None,
        workers: int = 1,
    ) -> None:
        if min(dim, probes or 1, bits or 1, workers) < 1 or (refine or 0) < 0:
            raise ConfigError("index: dim, probes, bits and workers must be at least 1, and refine not negative")
        if (bits or 1) > _MOST_BITS:
            raise ConfigError(f"index: bits must be at most {_MOST_BITS}, not {bits}")
        self.dim = dim
        self.exact_below = exact_below
        self._probes, self._refine, self._bits = probes, refine, bits
        self._workers = workers
        self._table: LanceTable | None = None
        self._covering = Covering(0, map_rows=False)
        self._held: Ids = as_ids(())
        self._warm = frozenset[str]()
        self._lock = threading.Lock()

    def attach(self, home: Home) -> None:
        """Search this home; see `HomeIndex.attach`."""
        table = getattr(home, "_table", None)
        if not isinstance(home, LanceHome) or not isinstance(table, LanceTable):
            raise ConfigError(
                "index.kind: lance is the index of a home of kind lance, which must be the last of `tiers`"
            )
        self._table = table
        in_store = table.location.folder is None
        self._refine = self._refine if self._refine is not None else 0 if in_store else _REFINE
        self._covering = Covering(_LOOSE * self.exact_below, map_rows=self._refine == 0)
        self._bits = self._bits or (_MOST_BITS if in_store else min(_MOST_BITS, math.ceil(_LEAST_BITS / self.dim)))

    def hold(self, ids: Ids) -> None:
        """Find these ids from now on. In an object store the index is loaded into memory, if it is not there."""
        with self._lock:
            self._held = distinct(np.concatenate([self._held, ids.astype(np.uint64)]))
        if self._table is not None and self._table.location.folder is None:
            self._table.read(self._load)

    def remove(self, ids: Ids) -> None:
        """Do not find these ids any more; unknown ones are passed over."""
        with self._lock:
            self._held = without(self._held, distinct(ids.astype(np.uint64)))

    def ids(self) -> Ids:
        """All ids held, ascending."""
        return self._held.copy()

    def __len__(self) -> int:
        return len(self._held)

    def search(self, vectors: Embeddings, k: int) -> tuple[npt.NDArray[np.uint64], Scores]:
        """The nearest ids and their scores; see `Index.search`."""
        held, vectors = self._held, self._checked(vectors, k)
        wanted = min(k, len(held))
        found = [self._open.read(partial(self._nearest, held=held, vector=vector, wanted=wanted)) for vector in vectors]
        width = min((len(ids) for ids, _ in found), default=wanted)  # fewer if some were forgotten meanwhile
        ids = np.array([ids[:width] for ids, _ in found], np.uint64).reshape(len(vectors), width)
        return ids, np.array([scores[:width] for _, scores in found], np.float32).reshape(len(vectors), width)

    def search_among(self, ids: Ids, vectors: Embeddings, k: int) -> tuple[npt.NDArray[np.uint64], Scores]:
        """`search` over these ids alone, by comparing all of them in float32."""
        vectors = self._checked(vectors, k)
        among = np.intersect1d(self._held, ids.astype(np.uint64))
        best_ids, best = np.zeros((len(vectors), 0), np.uint64), np.zeros((len(vectors), 0), np.float32)
        for start in range(0, len(among), _BATCH):
            part = among[start : start + _BATCH]
            known, held = self._open.read(partial(embeddings_of, ids=part))
            if not len(known):
                continue
            best = np.concatenate([best, _cosine(vectors, held)], 1)
            best_ids = np.concatenate([best_ids, np.broadcast_to(known, (len(vectors), len(known)))], 1)
            order = np.lexsort((best_ids, -best))[:, :k]
            best_ids, best = np.take_along_axis(best_ids, order, 1), np.take_along_axis(best, order, 1)
        return best_ids, best.astype(np.float32)

    def update(self) -> None:
        """Build the index of a table that is large enough, or add the rows to it that it lacks."""
        with self._open.upkeep() as dataset:
            rows = dataset.count_rows(filter="id is not null")
            if rows < max(self.exact_below, 2):
                return
            indexed = index_of(dataset)
            loose = uncovered(dataset, indexed)
            left = dataset.scanner(filter="id is not null", fragments=loose).count_rows() if loose else 0
            if (
                indexed is None
                or len(indexed.segments) >= _MOST_PARTS
                or 2 * left > rows
                or indexed.details["compression"]["num_bits"] != self._bits
            ):
                self._build(dataset, rows)
            elif left > self.exact_below // 2:
                dataset.optimize.optimize_indices(num_indices_to_merge=0, index_names=[NAME])

    def rebuild(self) -> None:
        """Build the index anew if there is one, with nothing of what was forgotten."""
        with self._open.upkeep() as dataset:
            if index_of(dataset) is not None:
                rows = dataset.count_rows(filter="id is not null")
                if rows < max(self.exact_below, 2):
                    dataset.drop_index(NAME)
                else:
                    self._build(dataset, rows)

    def _build(self, dataset: Any, rows: int) -> None:
        assert self._bits is not None  # since `attach`
        build(dataset, plan(dataset, rows, self._bits), self._workers)

    def _load(self, snapshot: Snapshot) -> None:
        """Load all that searches need, so that they ask the store for nothing."""
        coverage = self._covering.of(snapshot)
        if new := coverage.parts - self._warm:
            snapshot.dataset.prewarm_index(NAME, index_segments=sorted(new))
        self._warm = coverage.parts

    def _nearest(self, snapshot: Snapshot, held: Ids, vector: Embeddings, wanted: int) -> tuple[Ids, Scores]:
        """The nearest ``wanted`` of the ids held, or all of them that the table has."""
        if not wanted or snapshot.dim is None:
            return as_ids(()), np.zeros(0, np.float32)
        coverage = self._covering.of(snapshot)
        rest, rest_scores = coverage.nearest(vector, held, wanted)
        ask, exact = wanted + _SPARE, not coverage.parts
        ids, scores, all_there = as_ids(()), np.zeros(0, np.float32), True
        while coverage.parts or coverage.rest is None:
            ids, scores = self._candidates(snapshot, coverage, vector, ask, exact=exact)
            all_there = len(ids) < ask
            own = held[np.minimum(np.searchsorted(held, ids), len(held) - 1)] == ids
            farthest = scores.min(initial=1)
            ids, scores = ids[own], scores[own]
            if exact:
                rest, rest_scores = rest[:0], rest_scores[:0]
            if len(ids) + len(rest) >= wanted:
                lowest = -np.partition(-np.append(scores, rest_scores), wanted - 1)[wanted - 1]
                if all_there or farthest < lowest:  # or there may be more ids of the same score
                    break
            elif all_there and exact:
                break
            exact |= all_there
            ask *= 1 if all_there else 4
        ids, scores = np.append(ids, rest), np.append(scores, rest_scores)
        order = np.lexsort((ids, -scores))[:wanted]
        return ids[order], np.clip(scores[order], -1, 1).astype(np.float32)

    def _candidates(
        self, snapshot: Snapshot, coverage: Coverage, vector: Embeddings, count: int, *, exact: bool
    ) -> tuple[Ids, Scores]:
        """The nearest ids of a version and their cosines, of those that its index covers, or if ``exact`` of all."""
        nearest: dict[str, Any] = {"column": "embedding", "q": vector, "k": count, "metric": "cosine"}
        refine = self._refine if coverage.rest is not None else self._refine or _REFINE  # or units would differ
        if exact:
            nearest |= {"use_index": False}
        else:
            probes = self._probes or probes_of(coverage.lists)
            nearest |= {"minimum_nprobes": probes, "maximum_nprobes": probes}
            nearest |= {"refine_factor": refine} if refine else {"approx_mode": "accurate"}
        mapped = not (exact or refine)
        found = snapshot.dataset.scanner(
            columns=["_rowid" if mapped else "id", "_distance"],
            nearest=nearest,
            fast_search=not exact and coverage.rest is not None,
        ).to_table()
        distances = found["_distance"].to_numpy()
        if not mapped:
            return found["id"].to_numpy().astype(np.uint64), 1 - distances
        ids, known = self._covering.ids_of(found["_rowid"].to_numpy())
        return ids[known], 1 - distances[known] / 2  # of the index they are squares of lengths

    @property
    def _open(self) -> LanceTable:
        if self._table is None:
            raise TierError("the index has no home: it was not attached to one")
        return self._table

    def _checked(self, vectors: Embeddings, k: int) -> Embeddings:
        if k < 0:
            raise InputError(f"index: k must not be negative, not {k}")
        if vectors.ndim != 2 or vectors.shape[1] != self.dim:
            raise InputError(f"index: vectors of shape {vectors.shape}, not [n, {self.dim}]")
        if not np.isfinite(vectors).all():
            raise InputError("index: a vector is not finite")
        return np.ascontiguousarray(vectors, np.float32)


def probes_of(lists: int) -> int:
    """The lists that a search reads, of so many.

    In passages embedded by MiniLM 99 % of the five nearest lay in the nearest 47 of 70 lists and 89 of 250.
    """
    return max(1, min(lists, math.ceil(_PROBES * math.sqrt(lists))))


def _cosine(vectors: Embeddings, others: Embeddings) -> Scores:
    lengths = np.linalg.norm(vectors, axis=1)[:, None] * np.linalg.norm(others, axis=1)
    scores: Scores = np.clip(vectors @ others.T / np.maximum(lengths, np.finfo(np.float32).tiny), -1, 1)
    return scores
