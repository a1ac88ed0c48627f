"""`LanceTable`: the one table of a home, whose transactions are fenced: one that others came before is refused.

Lance rebases a commit on others that came meanwhile, unless both change the same fragment of rows. So every
transaction claims the first fragment of the table, the **anchor**, which holds one row and never changes. Of two
transactions that began at the same version only one wins, however long the other was stopped: it is refused, reads the
newest version, checks everything anew and tries again. `LanceTable.compact` keeps the newest version that claimed the
anchor: a refusal needs the record of what came before.
"""

import os
import random
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

from m3backends.lance.library import faults, is_conflict, lance
from m3backends.lance.location import Location
from m3backends.lance.schema import FILE_FORMAT, HEAD, Row, any_of, as_table, embedding_field, table_schema
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
_ROWS = 20_000
"""Most rows of a fragment. Compaction rewrites whole fragments."""


class LanceTable:
    """The table at a location. Thread-safe; several processes may write it."""

    def __init__(self, location: Location, *, slot_bytes: int | None, read_only: bool, fresh: float = 0.0) -> None:
        """Open the table, or make it with slots of ``slot_bytes``. Raises the errors of `Location.open`.

        In an object store a version counts as the newest for ``fresh`` seconds.
        """
        self.location = location
        self.read_only = read_only
        self._fresh = 0.0 if location.folder else fresh
        self._looked = time.monotonic()
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
            return self._write(work, self.location.changing)

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
                    made = self._commit(snapshot, change)
            except Exception as error:
                if not is_conflict(error):
                    raise
                self._wait(deadline, error)
            else:
                self.location.sync_version(made.version)
                self._adopt(made)
                return result

    def _commit(self, snapshot: Snapshot, change: Change) -> Any:
        """Commit a change of a version. Returns the new one.

        Raises what `is_conflict` knows if the version is no longer the newest one.
        """
        dataset = snapshot.dataset
        removed, updated = self._without(snapshot, {**change.gone, "key": [HEAD, *change.gone.get("key", ())]})
        added = self._written(change.rows, snapshot.dim)
        added += self._written([(change.head or snapshot.head).row()], snapshot.dim)  # the last fragment of all
        self.location.sync_fragments([*added, *updated])
        anchor = dataset.get_fragments()[0].metadata
        update = lance.LanceOperation.Update(removed, updated_fragments=[anchor, *updated], new_fragments=added)
        transaction = lance.Transaction(snapshot.version, update)
        try:
            return lance.LanceDataset.commit(dataset, transaction, max_retries=0)
        except Exception as error:
            if self.location.folder is None and (made := self._landed(transaction)) is not None:
                return made
            raise error

    def _landed(self, transaction: Any) -> Any:
        """The version that a transaction made although its commit failed: the store did it, and its answer was lost."""
        newest = self.location.dataset()
        for version in range(transaction.read_version + 1, newest.version + 1):
            try:
                if newest.read_transaction(version).uuid == transaction.uuid:
                    return newest
            except (OSError, ValueError, RuntimeError):  # cleaned up
                continue
        return None

    def _without(self, snapshot: Snapshot, gone: Mapping[str, Iterable[int | str]]) -> tuple[list[int], list[Any]]:
        """The fragments that lose all of their rows, and the new state of those that lose some."""
        where = " or ".join(any_of(column, values) for column, values in gone.items())
        rows = snapshot.table(where, ["key"], with_row_address=True)
        removed, updated = list[int](), list[Any]()
        for number in sorted({address >> 32 for address in rows["_rowaddr"].to_pylist()}):
            left = snapshot.dataset.get_fragment(number).delete(where)
            if left is None:
                removed.append(number)
            else:
                updated.append(left)
        return removed, updated

    def _written(self, rows: list[Row], dim: int | None) -> list[Any]:
        """Uncommitted fragments of rows."""
        if not rows:
            return []
        written = lance.fragment.write_fragments(
            as_table(rows, dim),
            self._bank,
            schema=table_schema(dim),
            mode="append",
            max_rows_per_file=_ROWS,
            data_storage_version=FILE_FORMAT,
            enable_stable_row_ids=True,
        )
        return list(written)

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
                    target_rows_per_fragment=_ROWS,
                    materialize_deletions_threshold=0.0,
                    excluded_fragment_ids=[fragments[0].fragment_id, fragments[-1].fragment_id],  # anchor and head
                )
            except Exception as error:
                if not is_conflict(error):
                    raise
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
