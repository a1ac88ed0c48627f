"""`BlockPlaces`: the rows that blocks lie in, so that a read needs no search of the table."""

import threading

import numpy as np
import numpy.typing as npt

from m3backends.lance.schema import any_of
from m3backends.lance.snapshot import Snapshot
from m3runtime.memory.block import Ids, as_ids

_LATE = 4096
"""Rows that were found one by one before they join the sorted ones."""

RowIds = npt.NDArray[np.int64]


class BlockPlaces:
    """Maps ids to row ids, 16 bytes for each block. Thread-safe.

    A row keeps its row id as long as it exists, and an id has one block ever. So an entry is right or its row is gone,
    and then reading the row fails.
    """

    def __init__(self) -> None:
        self._ids: Ids | None = None
        self._rows: RowIds = np.zeros(0, np.int64)
        self._late: dict[int, int] = {}
        self._lock = threading.Lock()

    def find(self, snapshot: Snapshot, ids: Ids) -> RowIds:
        """The row of each id's block, -1 where it has none."""
        with self._lock:
            known, known_rows = self._sorted(snapshot)
            at = np.minimum(np.searchsorted(known, ids), max(len(known) - 1, 0))
            found = np.where(known[at] == ids, known_rows[at], -1) if len(known) else np.full(len(ids), -1)
            if (missing := np.flatnonzero(found < 0)).size:
                for row in missing.tolist():
                    found[row] = self._late.get(int(ids[row]), -1)
                if (unknown := ids[found < 0]).size:
                    self._late |= search(snapshot, unknown)
                    for row in missing.tolist():
                        found[row] = self._late.get(int(ids[row]), -1)
        return found.astype(np.int64)

    def forget(self, ids: Ids) -> None:
        """Drop the entries of ids."""
        with self._lock:
            for id in ids.tolist():
                self._late.pop(id, None)
            if self._ids is not None:
                keep = ~np.isin(self._ids, ids)
                self._ids, self._rows = self._ids[keep], self._rows[keep]

    def _sorted(self, snapshot: Snapshot) -> tuple[Ids, RowIds]:
        if self._ids is None:
            found = snapshot.table("block_id is not null", ["block_id"], with_row_id=True, use_scalar_index=False)
            self._join(found["block_id"].to_numpy(), found["_rowid"].to_numpy())
        elif len(self._late) > _LATE:
            self._join(as_ids(list(self._late)), np.array(list(self._late.values())))
            self._late = {}
        assert self._ids is not None
        return self._ids, self._rows

    def _join(self, ids: Ids, rows: npt.NDArray[np.integer]) -> None:
        more = [ids] if self._ids is None else [self._ids, ids]
        joined, all_rows = np.concatenate(more), np.concatenate([self._rows, rows.astype(np.int64)])
        self._ids, first = np.unique(joined, return_index=True)
        self._rows = all_rows[first]


def search(snapshot: Snapshot, ids: Ids) -> dict[int, int]:
    """The row ids of the blocks of ids that have one."""
    found = snapshot.table(any_of("block_id", np.unique(ids).tolist()), ["block_id"], with_row_id=True)
    return dict(zip(found["block_id"].to_pylist(), found["_rowid"].to_pylist(), strict=True))
