"""`LanceTable`: the one table of a home, whose transactions are fenced: one that others came before is refused.

`m3backends.lance.fence` says how. `LanceTable.compact` keeps the newest version that claimed the anchor.
"""

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

from m3backends.lance.fence import ROWS, commit
from m3backends.lance.library import FAULTS, faults, is_conflict
from m3backends.lance.location import Location
from m3backends.lance.schema import embedding_field
from m3backends.lance.snapshot import Change, Snapshot
from m3runtime.errors import InputError, TierClosedError, TierError, TierReadOnlyError

T = TypeVar("T")
Work = Callable[[Snapshot], tuple[Change | None, T]]

_PATIENCE = 120.0
"""Seconds for which a transaction is tried again while others come before it."""
_PAUSE = 0.05
"""At most so many seconds until it is tried again: at random, so that two do not meet again."""
_TRIES = 20
"""Times that a read is tried again while the version that it reads is cleaned up."""

_FRAGMENT_BYTES = 1 << 30
_TEXT_BYTES = 1024
"""Bytes of a reference's text and places, for choosing the size of fragments."""
_MOST_ROWS = 1 << 20

_INDEXED = ("key", "id", "block_id")
_INDEXED_AT_LEAST = 16
"""At most one row in so many is not indexed yet: bringing an index up to date writes all of it anew."""


class LanceTable:
    """The table at a location. Thread-safe; several processes may write it."""

    index_each = 20_000
    """Least rows after which columns that are searched are indexed. A search compares rows that no index has yet."""

    def __init__(self, location: Location, *, slot_bytes: int | None, read_only: bool, fresh: float = 0.0) -> None:
        """Open the table, or make it with slots of ``slot_bytes``. Raises the errors of `Location.open`.

        In an object store a version counts as the newest for ``fresh`` seconds.
        """
        self.location = location
        self.read_only = read_only
        self._fresh = 0.0 if location.folder else fresh
        self._looked = time.monotonic()
        self._added = 0
        """Rows that were added here since the columns were indexed."""
        self._bank = location.uri
        self._process = os.getpid()
        self._closed = False
        self._writing = threading.RLock()
        self._adopting = threading.Lock()
        with faults(self._bank):
            self._newest = Snapshot(self._bank, location.open(slot_bytes, read_only=read_only))

    def close(self) -> None:
        """Refuse further calls. Closing twice is fine."""
        self._closed = True

    # Reading

    def read(self, work: Callable[[Snapshot], T], *, look: bool = False) -> T:
        """The result of ``work`` on the newest version. It is called again if that is cleaned up meanwhile.

        With ``look`` the version is not taken for the newest because it was so lately.
        """
        self._check_usable()
        with faults(self._bank):
            lately = not look and time.monotonic() - self._looked < self._fresh
            snapshot = self._newest if lately else self.newest()
            for _ in range(_TRIES):
                try:
                    return work(snapshot)
                except (OSError, ValueError, RuntimeError):
                    before, snapshot = snapshot, self.newest()
                    if before.version == snapshot.version:
                        raise
            return work(snapshot)

    def newest(self) -> Snapshot:
        """The newest version."""
        self._looked, known = time.monotonic(), self._newest
        return known if known.dataset.latest_version == known.version else self._adopt(self.location.dataset())

    def _adopt(self, dataset: Any) -> Snapshot:
        """The newest version that is known, of which this one may be a newer one."""
        snapshot = Snapshot(self._bank, dataset)
        with self._adopting:
            if snapshot.version > self._newest.version:
                self._newest = snapshot
            return self._newest

    # Writing

    def write(self, work: Work[T]) -> T:
        """Make the change that ``work`` finds right for the newest version, in one transaction.

        ``work`` returns the change, or None, and the result. It is called again for a newer version if another
        transaction came first. Raises what ``work`` raises; nothing has changed then.
        """
        self._check_writable()
        with self._writing, faults(self._bank):
            result = self._write(work, self.location.changing)
            if self._added >= max(self.index_each, self._newest.row_count // _INDEXED_AT_LEAST):
                self._added = 0
                with self.upkeep():
                    self._index_columns(anew=False)
            return result

    def widen_columns(self, dim: int) -> None:
        """Give the table its column of embeddings. Raises `InputError` if it has one of another length."""
        self._check_writable()
        with self._writing, faults(self._bank):
            while (known := self.newest().dim) is None:
                dataset = self.location.dataset()
                try:
                    dataset.add_columns(embedding_field(dim))
                except (OSError, ValueError, RuntimeError):
                    if self.newest().dim is None:
                        raise
                self.location.sync_version(dataset.version)
        if known != dim:
            raise InputError(f"embeddings have {dim} numbers, the stored ones {known}")

    def _write(self, work: Work[T], changing: Callable[[], AbstractContextManager[None]]) -> T:
        deadline = time.monotonic() + _PATIENCE
        while True:
            snapshot = self.newest()
            change, result = work(snapshot)
            if change is None:
                return result
            try:
                with changing():
                    made = commit(self.location, snapshot, change)
            except FAULTS as error:
                if not is_conflict(error):
                    raise
                self._wait(deadline, error)
            else:
                self.location.sync_version(made.version)
                self._adopt(made)
                self._added += len(change.rows)
                return result

    # Upkeep

    def compact(self) -> None:
        """Rewrite the fragments that have lost rows, and remove every file that only earlier versions need.

        In a folder the files go as well that a killed process left. Readers of an earlier version go on to the newest.
        """
        self._check_writable()
        with self._writing, faults(self._bank):
            folder = self.location.folder
            before = folder.files() if folder else set()
            self._rewrite()
            self._index_columns(anew=True)  # an index has names and digests of what was forgotten
            with self.location.changing(alone=True):
                self._write(lambda _: (Change(), None), nullcontext)  # keeps the fence: see above
                self.location.sync_all(but=before)
                kept = self._newest
                old = [one["version"] for one in kept.dataset.versions() if one["version"] < kept.version]
                if folder is not None:
                    folder.remove_remains()
                if old:
                    kept.dataset.cleanup_old_versions(timedelta(0), versions=old, delete_unverified=folder is not None)
                self.location.sync_version(kept.version)

    @contextmanager
    def upkeep(self) -> Iterator[Any]:
        """The newest version as a dataset, whose indexes may be changed. Transactions of others go on meanwhile."""
        self._check_writable()
        with self._writing, faults(self._bank):
            folder = self.location.folder
            before = folder.files() if folder else set()
            dataset = self.location.dataset()
            yield dataset
            self.location.sync_all(but=before)

    def _rewrite(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        while True:
            dataset = self.location.dataset()
            fragments = dataset.get_fragments()
            try:
                dataset.optimize.compact_files(
                    target_rows_per_fragment=_rows_of_fragment(Snapshot(self._bank, dataset)),
                    materialize_deletions_threshold=0.0,
                    excluded_fragment_ids=[fragments[0].fragment_id, fragments[-1].fragment_id],  # anchor and head
                )
            except FAULTS as error:
                if not is_conflict(error):
                    raise
                self._wait(deadline, error)
            else:
                return

    def _index_columns(self, *, anew: bool) -> None:
        """Index columns, or the rows that were added since. Without ``anew`` it is left to others if they change it."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            dataset = self.location.dataset()
            there = {name for one in dataset.describe_indices() for name in one.field_names}
            if dataset.count_rows() < self.index_each and not there & set(_INDEXED):
                return
            try:
                for column in _INDEXED:
                    if anew or column not in there:
                        dataset.create_scalar_index(column, "BTREE", name=f"{column}_idx", replace=True)
                if not anew and there >= set(_INDEXED):
                    dataset.optimize.optimize_indices(index_names=[f"{column}_idx" for column in _INDEXED])
                self._adopt(self.location.dataset())
            except FAULTS as error:
                if not is_conflict(error):
                    raise
                if not anew:
                    return
                self._wait(deadline, error)
            else:
                return

    def _wait(self, deadline: float, error: Exception) -> None:
        """Wait a little before the next attempt. Raises `TierError` after the deadline."""
        if time.monotonic() > deadline:
            raise TierError(f"bank {self._bank}: others kept writing for {_PATIENCE:.0f} s") from error
        time.sleep(random.uniform(0, _PAUSE))

    # Checks

    def _check_writable(self) -> None:
        self._check_usable()
        if self.read_only:
            raise TierReadOnlyError(f"bank {self._bank} is opened for reading only")

    def _check_usable(self) -> None:
        if self._closed:
            raise TierClosedError(f"bank {self._bank} is closed")
        if os.getpid() != self._process:
            raise TierError(f"bank {self._bank} was opened before this process forked; open it anew in this one")


def _rows_of_fragment(snapshot: Snapshot) -> int:
    """The rows of a fragment after compaction, so many that it has about `_FRAGMENT_BYTES` if every slot is full.

    A search reads its candidates from all fragments, and each fragment costs time. One with large blocks has fewer
    rows, for it is written anew as a whole.
    """
    per_reference = snapshot.head.slot_bytes + 4 * (snapshot.dim or 0) + _TEXT_BYTES
    return min(max(ROWS, 2 * _FRAGMENT_BYTES // per_reference), _MOST_ROWS)
