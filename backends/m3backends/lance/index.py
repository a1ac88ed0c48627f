"""`LanceIndex`: nearest-neighbour search by an index of the Lance home's own table, which takes no RAM for vectors."""

import math
import threading
from functools import partial
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

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

_NAME = "embedding_idx"
_SPARE = 8
"""Rows that are asked for beyond those wanted: some may not be held, others may have equal scores."""
_BATCH = 4096
_MOST_PARTS = 8
"""Parts of the index, one for each update, before all is built anew. Lance's own merging lowers recall."""


class LanceIndex(HomeIndex):
    """An index of type IVF_RQ in a Lance home. Scores are exact: the nearest candidates are compared in float32.

    A table of fewer than ``exact_below`` rows is searched without an index. ``probes`` is the number of lists, of about
    the square root of all rows, that a search reads, and ``refine`` the number of candidates for each result. Rows that
    are not in the index yet are found all the same, by comparing them all. Thread-safe.
    """

    def __init__(
        self,
        *,
        dim: int,
        dtype: Literal["f32", "f16"] = "f16",  # noqa: ARG002 - the home keeps float32
        exact_below: int = 20_000,
        probes: int = 50,
        refine: int = 10,
    ) -> None:
        if min(dim, probes, refine) < 1:
            raise ConfigError("index: dim, probes and refine must be at least 1")
        self.dim = dim
        self.exact_below = exact_below
        self._nearest_options = {"minimum_nprobes": probes, "maximum_nprobes": probes, "refine_factor": refine}
        self._table: LanceTable | None = None
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
            indexed = next((one for one in dataset.describe_indices() if one.name == _NAME), None)
            if rows < max(self.exact_below, 2):
                return
            if indexed is None or len(indexed.segments) >= _MOST_PARTS or rows > 2 * indexed.num_rows_indexed:
                self._build(dataset, rows)
            elif rows - indexed.num_rows_indexed > self.exact_below // 2:
                dataset.optimize.optimize_indices(num_indices_to_merge=0, index_names=[_NAME])

    def rebuild(self) -> None:
        """Build the index anew if there is one, with nothing of what was forgotten."""
        with self._open.upkeep() as dataset:
            if any(one.name == _NAME for one in dataset.describe_indices()):
                rows = dataset.count_rows(filter="id is not null")
                if rows < max(self.exact_below, 2):
                    dataset.drop_index(_NAME)
                else:
                    self._build(dataset, rows)

    def _build(self, dataset: Any, rows: int) -> None:
        lists = max(1, math.isqrt(rows))
        dataset.create_index(
            "embedding", "IVF_RQ", name=_NAME, metric="cosine", num_partitions=lists, num_bits=1, replace=True
        )

    def _load(self, snapshot: Snapshot) -> None:
        """Load the parts of the index that are new, so that a search asks the store for its candidates alone."""
        indexed = next((one for one in snapshot.dataset.describe_indices() if one.name == _NAME), None)
        parts = frozenset(str(part.uuid) for part in indexed.segments) if indexed else frozenset()
        if new := parts - self._warm:
            snapshot.dataset.prewarm_index(_NAME, index_segments=sorted(new))
        self._warm = parts

    def _nearest(self, snapshot: Snapshot, held: Ids, vector: Embeddings, wanted: int) -> tuple[Ids, Scores]:
        """The nearest ``wanted`` of the ids held, or all of them that the table has."""
        if not wanted or snapshot.dim is None:
            return as_ids(()), np.zeros(0, np.float32)
        ask, exact = wanted + _SPARE, False
        while True:
            options = {"use_index": False} if exact else self._nearest_options
            nearest = {"column": "embedding", "q": vector, "k": ask, "metric": "cosine", **options}
            found = snapshot.dataset.scanner(columns=["id", "_distance"], nearest=nearest).to_table()
            ids = found["id"].to_numpy().astype(np.uint64)
            scores = np.clip(1 - found["_distance"].to_numpy(), -1, 1).astype(np.float32)
            own = held[np.minimum(np.searchsorted(held, ids), len(held) - 1)] == ids
            all_there = len(ids) < ask
            if own.sum() >= wanted:
                lowest = np.sort(-scores[own])[wanted - 1]
                if all_there or -scores.min() > lowest:  # or there may be more ids of the same score
                    break
            elif all_there and exact:
                break
            exact |= all_there
            ask *= 1 if all_there else 4
        order = np.lexsort((ids[own], -scores[own]))[:wanted]
        return ids[own][order], scores[own][order]

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


def _cosine(vectors: Embeddings, others: Embeddings) -> Scores:
    lengths = np.linalg.norm(vectors, axis=1)[:, None] * np.linalg.norm(others, axis=1)
    scores: Scores = np.clip(vectors @ others.T / np.maximum(lengths, np.finfo(np.float32).tiny), -1, 1)
    return scores
