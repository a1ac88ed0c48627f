"""`LmdbReader`: the half of `LmdbHome` that reads."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import zstandard

from m3backends.lmdb.compression import dictionary_of, load_dictionary, unpack
from m3backends.lmdb.environment import Environment, ReadTransaction, WriteTransaction
from m3backends.lmdb.records import (
    Source,
    pack_ids,
    unpack_count,
    unpack_expiry,
    unpack_id,
    unpack_ids,
    unpack_number,
    unpack_source,
)
from m3backends.lmdb.schema import Databases
from m3backends.records import digest, pack_text, unpack_reference, unpack_state, unpack_text
from m3runtime.documents.reference import Reference
from m3runtime.documents.sources import SourceState
from m3runtime.errors import RecordError
from m3runtime.memory.block import Found, Ids, Rows
from m3runtime.storage.home import Home
from m3runtime.storage.tier import check_rows, read_by_host

if TYPE_CHECKING:
    from torch import Tensor

_PART = 4096
"""Most ids that are listed in one transaction."""
_TRIES = 3


class LmdbReader(Home):
    """The reading methods of `LmdbHome`. Each works on one snapshot, `embeddings` on one for each batch.

    Every record is checked as it is read: a damaged one raises `RecordError`.
    """

    path: Path
    _environment: Environment
    _db: Databases
    _above: int
    _dictionary: zstandard.ZstdCompressionDict | None = None

    @property
    def capacity(self) -> None:
        """None: the home has no bound in blocks."""
        return None

    def read(self, ids: Ids, out: "Tensor") -> Found:
        """Copy blocks into rows of ``out``, as `Home` says."""
        check_rows(ids, out, self.slot_bytes)
        if out.device.type != "cpu":
            return read_by_host(self, ids, out)
        found, rows_out = np.zeros(len(ids), np.bool_), out.numpy()

        def work(txn: ReadTransaction) -> None:
            keys = pack_ids(ids)
            self._environment.prefetch.fetch(txn, b"blocks", keys)
            for row, key in enumerate(keys):
                if txn.get(key, db=self._db.quarantine.handle) is None:
                    block = txn.get(key, db=self._db.blocks)
                    if block is not None:
                        _fill(rows_out[row], self._unpack(txn, block))
                        found[row] = True

        self._environment.read(work)
        return found

    def contains(self, ids: Ids) -> Found:
        """Which of these ids have a block that is not quarantined?"""
        return self._environment.read(
            lambda txn: np.array(
                [self._has(txn, key) and txn.get(key, db=self._db.quarantine.handle) is None for key in pack_ids(ids)],
                np.bool_,
            )
        )

    def __len__(self) -> int:
        def work(txn: ReadTransaction) -> int:
            apart = self._db.quarantine.count(txn)
            if apart and self._db.cold.count(txn):  # some of those may have no block
                apart = sum(self._has(txn, key) for key in pack_ids(self._db.quarantine.ids(txn)))
            return txn.stat(self._db.blocks)["entries"] - apart

        return self._environment.read(work)

    def next_id(self) -> int:
        """The id above all that were ever used."""
        return self._environment.read(self._next_id)

    def unused(self) -> int:
        """The number of ids that were passed over."""
        return self._environment.read(self._unused)

    def find(self, texts: Sequence[str], headings: Sequence[str] | None = None) -> list[int | None]:
        """The ids of the references with exactly these texts, or None; quarantined ones are found, too."""
        keys = [digest(text, heading) for text, heading in zip(texts, headings or [""] * len(texts), strict=True)]
        return self._environment.read(lambda txn: [self._db.digests.read(txn, key, unpack_id) for key in keys])

    def references(self, ids: Ids) -> list[Reference | None]:
        """The references of ids, or None; those of quarantined ids are found, too."""

        def work(txn: ReadTransaction) -> list[Reference | None]:
            keys = pack_ids(ids)
            self._environment.prefetch.fetch(txn, b"references", keys)
            return [self._db.references.read(txn, key, unpack_reference) for key in keys]

        return self._environment.read(work)

    def ids(self) -> Ids:
        """All remembered ids, ascending, without quarantined ones."""
        for _ in range(_TRIES):
            if (found := self._ids_in_parts()) is not None:
                return found

        def work(txn: ReadTransaction) -> Ids:
            return np.setdiff1d(self._db.references.ids(txn), self._db.quarantine.ids(txn), assume_unique=True)

        return self._environment.read(work)

    def cold(self, ids: Ids | None = None) -> Ids:
        """The cold ids among all, or among these, ascending."""

        def work(txn: ReadTransaction) -> Ids:
            asked = self._db.cold.ids(txn) if ids is None else np.unique(ids)
            return asked[[self._is_cold(txn, key) for key in pack_ids(asked)]]

        return self._environment.read(work)

    def ids_of(self, source: str) -> Ids:
        """The ids of a source, ascending, quarantined ones included."""
        key = digest(source)

        def work(txn: ReadTransaction) -> Ids:
            sources = self._db.sources
            cursor, known = txn.cursor(self._db.members), sources.read(txn, key, unpack_source)
            try:
                members = unpack_ids(cursor.iternext_dup() if cursor.set_key(key) else ())
            except ValueError as error:
                raise sources.damaged(key, f"its members are not: {error}") from error
            if not (known or Source(source, 0, 0)).fits(members):
                raise sources.damaged(key, "its members are not those it counts")
            return members

        return self._environment.read(work)

    def sources(self) -> Mapping[str, int]:
        """The number of references of each source, quarantined ones included."""
        return self._environment.read(lambda txn: dict(known for _, known in self._db.sources.items(txn, unpack_count)))

    def states(self) -> Mapping[str, SourceState]:
        """The states of sources that are known; a damaged record is left out."""

        def work(txn: ReadTransaction) -> dict[str, SourceState]:
            table, found = self._db.states, dict[str, SourceState]()
            for key, stored in txn.cursor(table.handle) if table.exists else ():
                with suppress(RecordError):
                    name, state = table.unpack(key, table.open(key, stored), unpack_state)
                    found[name] = state
            return found

        return self._environment.read(work)

    def expiring(self, before: str | None = None) -> Mapping[str, Ids]:
        """The references that expire, by day, as `Home.expiring` says."""

        def work(txn: ReadTransaction) -> dict[str, Ids]:
            found = dict[str, list[int]]()
            try:
                keys = (unpack_expiry(key) for key, _ in self._db.expiring.items(txn, bytes))
                for day, id in takewhile(lambda one: before is None or one[0] < before, keys):
                    found.setdefault(day, []).append(id)
            except RecordError:  # what is damaged may be the day: the references themselves say it
                found = self._expiring_references(txn, before)
            return {day: np.array(sorted(ids), np.uint64) for day, ids in sorted(found.items())}

        return self._environment.read(work) if self._db.expiring.exists else {}

    def embeddings(self, ids: Ids | None = None, batch: int = 4096) -> Iterator[tuple[Ids, npt.NDArray[np.float32]]]:
        """Embeddings in batches, as `Home.embeddings` says. Given ids are found in quarantine, too."""
        wanted = self.ids() if ids is None else ids
        for start in range(0, len(wanted), batch):
            some = wanted[start : start + batch]

            def work(txn: ReadTransaction, some: Ids = some) -> tuple[Ids, npt.NDArray[np.float32]]:
                values = [self._db.embeddings.get(txn, key) for key in pack_ids(some)]
                known = some[[value is not None for value in values]]
                return known, self._vectors(known, [value for value in values if value is not None])

            known_ids, vectors = self._environment.read(work)
            if len(known_ids):
                yield known_ids, vectors

    def quarantined(self) -> Mapping[int, str]:
        """Maps each quarantined id to the reason."""

        def work(txn: ReadTransaction) -> dict[int, str]:
            return {unpack_id(key): reason for key, reason in self._db.quarantine.items(txn, unpack_text)}

        return self._environment.read(work)

    def get_meta(self, key: str) -> bytes | None:
        """The value that `set_meta` stored, or None."""
        return self._environment.read(lambda txn: self._db.meta.read(txn, pack_text(key), bytes))

    def revision(self) -> int:
        """The number of the last transaction."""
        return self._environment.read(lambda txn: txn.id())

    def stored_bytes(self) -> int:
        """The size of ``data.mdb``. Room that forgetting leaves is used again and stays in the file."""
        return self._environment.read(lambda _: self._environment.files.data.stat().st_size)

    def close(self) -> None:
        """Wait for running calls and close. Closing twice is fine."""
        self._environment.close()

    def _expiring_references(self, txn: ReadTransaction, before: str | None) -> dict[str, list[int]]:
        table, found = self._db.references, dict[str, list[int]]()
        for key, stored in txn.cursor(table.handle):
            with suppress(RecordError):
                reference = table.unpack(key, table.open(key, stored), unpack_reference)
                for day in {place.expires for place in reference.places if place.expires}:
                    if before is None or day < before:
                        found.setdefault(day, []).append(unpack_id(key))
        return found

    def _ids_in_parts(self) -> Ids | None:
        """`ids`, read in several transactions; None if there was a commit between them.

        The keys lie among the texts, so that one transaction would have much of the file in memory at once.
        """
        parts, snapshots, start = list[Ids](), set[int](), b""
        while True:

            def work(txn: ReadTransaction, start: bytes = start) -> tuple[int, Ids, Ids]:
                return txn.id(), self._db.references.ids(txn, start, _PART), self._db.quarantine.ids(txn)

            snapshot, part, apart = self._environment.read(work)
            snapshots.add(snapshot)
            parts.append(part)
            if len(snapshots) > 1:
                return None
            if len(part) < _PART:
                return np.setdiff1d(np.concatenate(parts), apart, assume_unique=True)
            start = pack_ids(part[-1:])[0] + b"\0"

    def _has(self, txn: ReadTransaction | WriteTransaction, key: bytes) -> bool:
        """Is a block stored? A cursor, unlike `get`, does not read it."""
        return txn.cursor(self._db.blocks).set_key(key)

    def _is_cold(self, txn: ReadTransaction | WriteTransaction, key: bytes) -> bool:
        """Is this id still without its block?"""
        return self._db.cold.has(txn, key) and not (self._has(txn, key) or self._db.quarantine.has(txn, key))

    def _vectors(self, ids: Ids, values: Sequence[memoryview]) -> npt.NDArray[np.float32]:
        """``float32[n, dim]`` of the stored embeddings of ids, which must be of one length, and finite."""
        sizes = np.array([len(value) for value in values], np.int64)
        wrong = (sizes != sizes[:1]) | (sizes % 4 != 0)
        vectors = np.zeros((0, 0), np.float32)
        if len(values) and not wrong.any():
            vectors = np.frombuffer(b"".join(values), "<f4").astype(np.float32).reshape(len(values), -1)
            wrong = ~np.isfinite(vectors).all(axis=1)
        if wrong.any():
            row = int(np.flatnonzero(wrong)[0])
            raise self._db.embeddings.damaged(
                pack_ids(ids)[row], f"it is not finite, or has {sizes[row]} bytes and others {sizes[0]}"
            )
        return vectors

    def _next_id(self, txn: ReadTransaction | WriteTransaction) -> int:
        next_id = self._db.home.read(txn, b"next_id", unpack_number)
        if next_id is None:
            raise self._db.home.damaged(b"next_id", "it is missing")
        return max(next_id, self._above)

    def _unused(self, txn: ReadTransaction | WriteTransaction) -> int:
        return self._db.home.read(txn, b"unused", unpack_number) or 0

    def _unpack(self, txn: ReadTransaction | WriteTransaction, stored: memoryview) -> Rows:
        """The block that was stored. The writer may have made the dictionary since this home was opened."""
        if self._dictionary is None and dictionary_of(stored):
            self._dictionary = self._db.home.read(txn, b"dictionary", load_dictionary)
        return unpack(stored, self.slot_bytes, self._dictionary)


def _fill(row: Rows, whole: Rows) -> None:
    """Copy a block into a slot, and zeros behind it, so that no bytes of a former read stand there."""
    stored = whole[: len(row)]
    row[: len(stored)] = stored
    row[len(stored) :] = 0
