"""`LanceHome`: a bank's blocks, references and embeddings in one Lance table, which many processes may write."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from m3backends.batches import checked_embeddings, without_padding
from m3backends.lance.audit import audit
from m3backends.lance.block_files import BlockFiles
from m3backends.lance.edit import Edit
from m3backends.lance.location import INDEX_CACHE, Location
from m3backends.lance.naming import name_table, named_table
from m3backends.lance.places import BlockPlaces, search
from m3backends.lance.reader import LanceReader, cold_among
from m3backends.lance.schema import META, block_row, mark_row, named, record_row
from m3backends.lance.snapshot import Change, Snapshot
from m3backends.lance.table import LanceTable
from m3runtime.config.units import Size
from m3runtime.documents.reference import Reference
from m3runtime.errors import BankError, BankMismatchError, InputError
from m3runtime.memory.block import Found, Ids
from m3runtime.storage.home import Batch, Changes, Damage
from m3runtime.storage.tier import check_ids

if TYPE_CHECKING:
    from torch import Tensor

Durability = Literal["full", "commit"]


class LanceHome(LanceReader):
    """The home in the folder ``path``, which holds nothing else; or at ``url``, which the folder then names.

    A ``url`` such as ``s3://bucket/bank`` is of an object store, whose credentials are in the environment. Calls that
    read work on a version that was the newest at most ``fresh`` seconds ago; `revision` and calls that write look
    anew. In a folder every call does.

    ``slot_bytes`` is fixed when the home is made; without it, an existing home is opened. Every method is one
    transaction (`embeddings`: one a batch). Thread-safe.

    Any number of processes, on any number of machines that share the folder, may write and read at once. A transaction
    that another came before is worked out anew. Ids that were reserved by `reserve` are this home's alone.

    ``durability`` is what a call survives once it returned: with ``full`` a power cut, with ``commit`` that the process
    is killed; a power cut may then undo the last calls, or lose the bank. A home must not be used across a fork: it
    raises `TierError` then. ``index_cache`` is the most bytes of indexes that are held in memory.

    Raises `BankMissingError` if there is nothing to open, `BankFormatError` if another version wrote it,
    `BankMismatchError` if its slots are of another size, and `BankError` if it is no bank or is damaged.
    """

    name = "lance"

    def __init__(
        self,
        *,
        path: str | os.PathLike[str],
        slot_bytes: int | None = None,
        url: str | None = None,
        fresh: float = 1.0,
        durability: Durability = "full",
        index_cache: Size = INDEX_CACHE,
        read_only: bool = False,
    ) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise BankError(f"{self.path} is not the folder of a bank")
        uri = (
            str(self.path)
            if url is None
            else named_table(self.path, url, make=slot_bytes is not None and not read_only)
        )
        location = Location(uri, durable=durability == "full", index_cache=index_cache)
        self._table = LanceTable(location, slot_bytes=slot_bytes, read_only=read_only, fresh=fresh)
        if url is not None and not read_only:
            name_table(self.path, url, self._table)
        self.slot_bytes = self._table.read(lambda snapshot: snapshot.head.slot_bytes)
        if slot_bytes not in (None, self.slot_bytes):
            raise BankMismatchError(f"bank {self.path} has slots of {self.slot_bytes} bytes, not {slot_bytes}")
        self._places = BlockPlaces()
        self._files = BlockFiles(location.folder.path) if location.folder else None
        self._reserved: list[range] = []
        self._reserving = threading.Lock()

    def reserve(self, count: int) -> int:
        """Reserve ids for this home alone; see `Home.reserve`."""

        def work(snapshot: Snapshot) -> tuple[Change, int]:
            edit = Edit(snapshot)
            first = snapshot.head.next_id
            edit.use(first + count, 0)
            return edit.change(), first

        first = self._table.write(work)
        with self._reserving:
            self._reserved.append(range(first, first + count))
        return first

    def write(self, ids: Ids, blocks: "Tensor") -> None:
        """Store blocks without references: they can be read, and nothing will recall them.

        Ids that are held are passed over. Raises `InputError` for an id that was used and is no longer.
        """
        stored = _own_bytes(ids, blocks, self.slot_bytes)

        def work(snapshot: Snapshot) -> tuple[Change | None, None]:
            held = search(snapshot, ids)
            new = {id: block for id, block in reversed(list(zip(ids.tolist(), stored, strict=True))) if id not in held}
            if not new:
                return None, None
            edit = Edit(snapshot)
            self._use(edit, list(new))
            edit.add_rows(block_row(id, block) for id, block in sorted(new.items()))
            return edit.change(), None

        self._table.write(work)
        self._spend(ids)

    def commit(self, batch: Batch, *, replacing: Ids | None = None, changes: Changes | None = None) -> None:
        """Add a batch in one transaction; see `Home.commit`."""
        stored = _own_bytes(batch.ids, batch.blocks, self.slot_bytes)
        self._add(batch.ids, batch.references, batch.embeddings, stored, replacing, changes)

    def catalogue(
        self,
        ids: Ids,
        references: Sequence[Reference],
        embeddings: npt.NDArray[np.float32],
        *,
        changes: Changes | None = None,
    ) -> None:
        """Add cold references in one transaction; see `Home.catalogue`."""
        check_ids(ids)
        self._add(ids, references, embeddings, None, None, changes)

    def change(self, changes: Changes) -> None:
        """Change places and states in one transaction; see `Home.change`."""

        def work(snapshot: Snapshot) -> tuple[Change, None]:
            edit = Edit(snapshot)
            edit.move(changes.places)
            edit.state(changes.states)
            return edit.change(), None

        self._table.write(work)

    def fill(self, ids: Ids, blocks: "Tensor") -> Found:
        """Give cold ids their blocks in one transaction; see `Home.fill`."""
        stored = _own_bytes(ids, blocks, self.slot_bytes)

        def work(snapshot: Snapshot) -> tuple[Change | None, Found]:
            unique, first = np.unique(ids, return_index=True)
            cold = np.isin(unique, cold_among(snapshot, unique))
            filled = np.zeros(len(ids), np.bool_)
            filled[first[cold]] = True
            if not cold.any():
                return None, filled
            edit = Edit(snapshot)
            edit.add_rows(block_row(int(ids[row]), stored[row]) for row in np.flatnonzero(filled))
            return edit.change(), filled

        return self._table.write(work)

    def _add(
        self,
        ids: Ids,
        references: Sequence[Reference],
        embeddings: npt.NDArray[np.float32],
        stored: Sequence[bytes] | None,
        replacing: Ids | None,
        changes: Changes | None,
    ) -> None:
        """Add references with their blocks; without those they are cold."""
        count = len(ids)
        vectors = checked_embeddings(ids, references, embeddings)
        changes = changes or Changes()

        def work(snapshot: Snapshot) -> tuple[Change, None]:
            edit = Edit(snapshot)
            if replacing is not None:
                edit.forget(replacing)
            edit.move(changes.places)
            if count:
                self._use(edit, ids.tolist())
                edit.add(ids, references, vectors)
                edit.add_rows(
                    block_row(id, block) for id, block in zip(ids.tolist(), stored or (), strict=stored is not None)
                )
            edit.state(changes.states)
            return edit.change(), None

        if count:
            self._table.widen_columns(vectors.shape[1])
        self._table.write(work)
        self._spend(ids)

    def discard(self, ids: Ids) -> None:
        """Forget for good: block, reference, embedding and all; the ids are never used again."""

        def work(snapshot: Snapshot) -> tuple[Change | None, None]:
            if not len(ids):
                return None, None
            edit = Edit(snapshot)
            edit.forget(ids)
            return edit.change(), None

        self._table.write(work)

    def quarantine(self, id: int, reason: str) -> None:
        """Quarantine a bad block; an id that has no block and is not cold is passed over."""

        def work(snapshot: Snapshot) -> tuple[Change | None, None]:
            known = snapshot.rows(f"id = {id} or block_id = {id}", ["id"])
            if not known or snapshot.marks.get(id) == reason:
                return None, None
            edit = Edit(snapshot)
            edit.unmark(id)
            edit.add_rows([mark_row(id, reason)])
            return edit.change(), None

        self._table.write(work)

    def set_meta(self, key: str, value: bytes) -> None:
        """Store a small value durably."""

        def work(snapshot: Snapshot) -> tuple[Change, None]:
            edit = Edit(snapshot)
            edit.drop(named(META, key))
            edit.add_rows([record_row(named(META, key), value)])
            return edit.change(), None

        self._table.write(work)

    def widen(self, slot_bytes: int) -> None:
        """Make slots larger; see `Home.widen`."""
        if slot_bytes < self.slot_bytes:
            raise InputError(f"slots of {self.slot_bytes} bytes cannot become slots of {slot_bytes}")

        def work(snapshot: Snapshot) -> tuple[Change, None]:
            edit = Edit(snapshot)
            edit.head = replace(edit.head, slot_bytes=max(slot_bytes, edit.head.slot_bytes))
            return edit.change(), None

        self._table.write(work)
        self.slot_bytes = slot_bytes

    def compact(self) -> None:
        """Rewrite all files that have rows which are gone, and remove the old ones; see `Home.compact`."""
        self._table.compact()

    def audit(self, progress: Callable[[int, int], None] | None = None) -> Iterator[Damage]:
        """Audit the rows of the newest version, as `Home.audit` says. Its steps are rows."""
        return audit(self._table.read(lambda snapshot: snapshot), progress)

    def _use(self, edit: Edit, ids: Sequence[int]) -> None:
        """Take these ids. Raises `InputError` for one that was used before, or that another home reserved."""
        next_id = edit.snapshot.head.next_id
        with self._reserving:
            for id in ids:
                if id < next_id and not any(id in some for some in self._reserved):
                    raise InputError(f"id {id} was used before; the next is {next_id}")
        edit.use(max(ids) + 1, len(set(ids)))

    def _spend(self, ids: Ids) -> None:
        """Ids that were reserved are used now, and all below them."""
        if len(ids):
            with self._reserving:
                last = int(ids.max())
                self._reserved = [
                    range(last + 1, some.stop) if last in some else some
                    for some in self._reserved
                    if last + 1 < some.stop or last not in some
                ]


def _own_bytes(ids: Ids, blocks: "Tensor", slot_bytes: int) -> list[bytes]:
    """The bytes of each block. Raises `InputError` if its header does not fit."""
    return [block.tobytes() for block in without_padding(ids, blocks, slot_bytes)]
