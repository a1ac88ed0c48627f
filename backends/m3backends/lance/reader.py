"""`LanceReader`: the half of `LanceHome` that reads."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from m3backends.lance.block_files import BlockFiles
from m3backends.lance.places import BlockPlaces, RowIds, search
from m3backends.lance.schema import (
    META,
    STATE,
    TEXT,
    Row,
    any_of,
    escaped,
    named,
    opened,
    seal_embedding,
    unescaped,
)
from m3backends.lance.snapshot import Snapshot
from m3backends.lance.table import LanceTable
from m3backends.records import digest, unpack_reference, unpack_state
from m3runtime.documents.reference import Reference
from m3runtime.documents.sources import SourceState
from m3runtime.errors import RecordError
from m3runtime.memory.block import Found, Ids, Rows, as_ids, distinct, without
from m3runtime.storage.home import Home
from m3runtime.storage.tier import check_ids, check_rows, read_by_host

if TYPE_CHECKING:
    from torch import Tensor

REFERENCE = ["id", "key", "value", "seal", "sources", "expires"]
"""The columns of a reference without its embedding."""


class LanceReader(Home):
    """The reading methods of `LanceHome`. Each works on one version of the table, `embeddings` on one for each batch.

    Every record is checked as it is read: a damaged one raises `RecordError`.
    """

    _table: LanceTable
    _places: BlockPlaces
    _files: BlockFiles | None
    """None in an object store."""

    @property
    def capacity(self) -> None:
        """None: the home has no bound in blocks."""
        return None

    def read(self, ids: Ids, out: "Tensor") -> Found:
        """Copy blocks into rows of ``out``, as `Home` says."""
        check_rows(ids, out, self.slot_bytes)
        if out.device.type != "cpu":
            return read_by_host(self, ids, out)
        wanted, first, place = np.unique(ids, return_index=True, return_inverse=True)
        rows_out = out.numpy()
        held = self._table.read(lambda snapshot: self._fill_rows(snapshot, wanted, rows_out, first))
        for row in np.flatnonzero(held[place] & (first[place] != np.arange(len(ids)))).tolist():
            rows_out[row] = rows_out[first[place[row]]]
        found: Found = held[place]
        return found

    def contains(self, ids: Ids) -> Found:
        """Which of these ids have a block that is not quarantined?"""
        check_ids(ids)

        def work(snapshot: Snapshot) -> Found:
            held = search(snapshot, ids)
            return np.array([id in held and id not in snapshot.marks for id in ids.tolist()], np.bool_)

        return self._table.read(work)

    def __len__(self) -> int:
        def work(snapshot: Snapshot) -> int:
            blocks = snapshot.dataset.count_rows(filter="block_id is not null")
            return int(blocks) - len(search(snapshot, as_ids(list(snapshot.marks))))

        return self._table.read(work)

    def next_id(self) -> int:
        """The id above all that were ever used or reserved."""
        return self._table.read(lambda snapshot: snapshot.head.next_id)

    def unused(self) -> int:
        """The number of ids that were reserved and not used, or passed over."""
        return self._table.read(lambda snapshot: snapshot.head.unused)

    def find(self, texts: Sequence[str], headings: Sequence[str] | None = None) -> list[int | None]:
        """The ids of the references with exactly these texts, or None; quarantined ones are found, too."""
        keys = [
            TEXT + digest(text, heading).hex()
            for text, heading in zip(texts, headings or [""] * len(texts), strict=True)
        ]

        def work(snapshot: Snapshot) -> list[int | None]:
            rows = snapshot.rows(any_of("key", sorted(set(keys))), REFERENCE)
            known = {row["key"]: row["id"] for row in rows if opened(snapshot.bank, row, "reference")}
            return [known.get(key) for key in keys]

        return self._table.read(work)

    def references(self, ids: Ids) -> list[Reference | None]:
        """The references of ids, or None; those of quarantined ids are found, too."""

        def work(snapshot: Snapshot) -> list[Reference | None]:
            rows = snapshot.rows(any_of("id", np.unique(ids).tolist()), REFERENCE)
            known = {row["id"]: as_reference(snapshot.bank, row) for row in rows}
            return [known.get(id) for id in ids.tolist()]

        return self._table.read(work)

    def ids(self) -> Ids:
        """All remembered ids, ascending, without quarantined ones."""
        return self._table.read(lambda snapshot: remembered(snapshot, "id"))

    def cold(self, ids: Ids | None = None) -> Ids:
        """The cold ids among all, or among these, ascending."""

        def work(snapshot: Snapshot) -> Ids:
            if ids is None:
                return without(remembered(snapshot, "id"), remembered(snapshot, "block_id"))
            return cold_among(snapshot, np.unique(ids))

        return self._table.read(work)

    def ids_of(self, source: str) -> Ids:
        """The ids of a source, ascending, quarantined ones included."""

        def work(snapshot: Snapshot) -> Ids:
            if source not in snapshot.members:
                rows = snapshot.rows(f"array_has(sources, '{escaped(source)}')", REFERENCE)
                own = sorted(row["id"] for row in rows if opened(snapshot.bank, row, "reference"))
                snapshot.members[source] = as_ids(own)
            return snapshot.members[source].copy()

        return self._table.read(work)

    def sources(self) -> Mapping[str, int]:
        """The number of references of each source, quarantined ones included."""

        def work(snapshot: Snapshot) -> dict[str, int]:
            listed = snapshot.table("id is not null", ["sources"])["sources"].combine_chunks().flatten()
            return {unescaped(one["values"]): one["counts"] for one in listed.value_counts().to_pylist()}

        return self._table.read(work)

    def states(self) -> Mapping[str, SourceState]:
        """The states of sources that are known; a damaged record is left out."""

        def work(snapshot: Snapshot) -> dict[str, SourceState]:
            found = dict[str, SourceState]()
            for row in snapshot.rows(f"starts_with(key, '{STATE}')", ["key", "value", "seal"]):
                with suppress(RecordError, ValueError):
                    name, state = unpack_state(opened(snapshot.bank, row, "state"))
                    found[name] = state
            return found

        return self._table.read(work)

    def expiring(self, before: str | None = None) -> Mapping[str, Ids]:
        """The references that expire, by day, as `Home.expiring` says."""

        def work(snapshot: Snapshot) -> dict[str, Ids]:
            found = dict[str, list[int]]()
            for row in snapshot.rows("expires is not null", ["id", "expires"]):
                for day in row["expires"] or ():
                    if before is None or day < before:
                        found.setdefault(day, []).append(row["id"])
            return {day: as_ids(sorted(ids)) for day, ids in sorted(found.items())}

        return self._table.read(work)

    def embeddings(self, ids: Ids | None = None, batch: int = 4096) -> Iterator[tuple[Ids, npt.NDArray[np.float32]]]:
        """Embeddings in batches, as `Home.embeddings` says. Given ids are found in quarantine, too."""
        wanted = self.ids() if ids is None else ids
        for start in range(0, len(wanted), batch):
            some = wanted[start : start + batch]

            def work(snapshot: Snapshot, some: Ids = some) -> tuple[Ids, npt.NDArray[np.float32]]:
                return embeddings_of(snapshot, some)

            known, vectors = self._table.read(work)
            if len(known):
                yield known, vectors

    def quarantined(self) -> Mapping[int, str]:
        """Maps each quarantined id to the reason."""
        return self._table.read(lambda snapshot: dict(sorted(snapshot.marks.items())))

    def get_meta(self, key: str) -> bytes | None:
        """The value that `set_meta` stored, or None."""

        def work(snapshot: Snapshot) -> bytes | None:
            rows = snapshot.rows(any_of("key", [named(META, key)]), ["key", "value", "seal"])
            return opened(snapshot.bank, rows[0], "record") if rows else None

        return self._table.read(work)

    def revision(self) -> int:
        """The number of the newest version."""
        return self._table.read(lambda snapshot: snapshot.version, look=True)

    def stored_bytes(self) -> int:
        """Bytes of all files, those of earlier versions included."""
        return self._table.read(lambda snapshot: self._table.location.stored_bytes(snapshot.dataset))

    def close(self) -> None:
        """Let go of the table. Running calls end as they should. Closing twice is fine."""
        self._table.close()

    def _fill_rows(self, snapshot: Snapshot, ids: Ids, out: Rows, into: npt.NDArray[np.intp]) -> Found:
        """Copy the block of each id, given once, into its row of ``out``. True where there is one."""
        rows = self._places.find(snapshot, ids)
        try:
            return self._read_rows(snapshot, ids, rows, out, into)
        except ValueError:  # some were forgotten
            there = search(snapshot, ids)
            self._places.forget(ids[[id not in there for id in ids.tolist()]])
            rows = np.array([there.get(id, -1) for id in ids.tolist()], np.int64)
            return self._read_rows(snapshot, ids, rows, out, into)

    def _read_rows(self, snapshot: Snapshot, ids: Ids, rows: RowIds, out: Rows, into: npt.NDArray[np.intp]) -> Found:
        """Copy the blocks in these rows, where there is a row. Raises `ValueError` if a row is gone."""
        held = np.array([rows[at] >= 0 and id not in snapshot.marks for at, id in enumerate(ids.tolist())], np.bool_)
        some, targets = rows[held].tolist(), into[held].tolist()
        if some and not (self._files and self._files.read(snapshot, some, out, targets)):
            blobs = snapshot.dataset.read_blobs("block", ids=some, preserve_order=True)
            for row, (_, block) in zip(targets, blobs, strict=True):
                own = np.frombuffer(block, np.uint8)[: out.shape[1]]
                out[row, : len(own)] = own
                out[row, len(own) :] = 0  # or bytes of a former read would stand there
        return held


def as_reference(bank: str, row: Mapping[str, Any]) -> Reference:
    """The reference in a row with the columns `REFERENCE`. Raises `RecordError`."""
    try:
        return unpack_reference(opened(bank, row, "reference"))
    except ValueError as error:
        raise RecordError(f"bank {bank}: the reference of {row['id']} is damaged: {error}", row["id"]) from error


def remembered(snapshot: Snapshot, column: str) -> Ids:
    """The ids in a column, ascending, without quarantined ones."""
    ids = distinct(snapshot.table(f"{column} is not null", [column], use_scalar_index=False)[column].to_numpy())
    return without(ids, as_ids(list(snapshot.marks)))


def cold_among(snapshot: Snapshot, ids: Ids) -> Ids:
    """The ids among these, which are ascending, that are cold."""
    known = {row["id"] for row in snapshot.rows(any_of("id", ids.tolist()), ["id"])}
    known -= search(snapshot, ids).keys() | snapshot.marks.keys()
    return ids[[id in known for id in ids.tolist()]]


def embeddings_of(snapshot: Snapshot, ids: Ids) -> tuple[Ids, npt.NDArray[np.float32]]:
    """The known ones among ids, in their order, and their embeddings. Raises `RecordError` for a damaged one."""
    if snapshot.dim is None:
        return ids[:0], np.zeros((0, 0), np.float32)
    where = any_of("id", np.unique(ids).tolist())
    found = snapshot.table(where, ["id", "embedding", "embedding_seal"])
    vectors = as_vectors(found["embedding"], snapshot.dim)
    rows = dict[int, int]()
    for row, (id, sealed) in enumerate(zip(found["id"].to_pylist(), found["embedding_seal"].to_pylist(), strict=True)):
        if seal_embedding(id, vectors[row]) != sealed or not np.isfinite(vectors[row]).all():
            raise RecordError(f"bank {snapshot.bank}: the embedding of {id} is damaged: its digest does not match", id)
        rows[id] = row
    known = ids[[id in rows for id in ids.tolist()]]
    return known, vectors[[rows[id] for id in known.tolist()]]


def as_vectors(column: Any, dim: int) -> npt.NDArray[np.float32]:
    """``float32[n, dim]`` of a column of embeddings."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    flat = whole.flatten().to_numpy(zero_copy_only=False)
    return np.ascontiguousarray(flat, np.float32).reshape(-1, dim)


def keyed(rows: Sequence[Row]) -> dict[str, Row]:
    """Rows by their key."""
    return {row["key"]: row for row in rows}
