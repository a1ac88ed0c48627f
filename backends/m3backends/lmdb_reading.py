"""What an `LmdbHome` reads."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m3backends.lmdb_compression import unpack
from m3backends.lmdb_environment import Environment, Reading, Writing
from m3backends.lmdb_records import digest, pack_ids, pack_text, unpack_ids, unpack_reference, unpack_text
from m3backends.lmdb_schema import Databases
from m3runtime.block import HEADER_BYTES, Found, Ids, Rows, length
from m3runtime.errors import TierError
from m3runtime.tier import Home, Reference, check_rows


class LmdbReading(Home):
    """The half of `LmdbHome` that reads. Each method is one snapshot; `embeddings` is one for each batch."""

    path: Path
    _environment: Environment
    _db: Databases

    @property
    def capacity(self) -> None:
        """None: see `Tier.capacity`."""
        return None

    def read(self, ids: Ids, out: Tensor) -> Found:
        """See `Tier.read`. `block.check` finds damage: bytes that a block lacks are zeros."""
        check_rows(ids, out, self.slot_bytes)
        if out.device.type != "cpu":
            staging = torch.empty(out.shape, dtype=torch.uint8)
            found = self.read(ids, staging)
            rows = torch.from_numpy(np.flatnonzero(found))
            out[rows.to(out.device)] = staging[rows].to(out.device)
            return found
        found, rows_out = np.zeros(len(ids), np.bool_), out.numpy()

        def work(txn: Reading) -> None:
            for row, key in enumerate(pack_ids(ids)):
                if txn.get(key, db=self._db.quarantine) is None:
                    block = txn.get(key, db=self._db.blocks)
                    if block is not None:
                        _fill(rows_out[row], block)
                        found[row] = True

        self._environment.read(work)
        return found

    def contains(self, ids: Ids) -> Found:
        """See `Tier.contains`."""
        return self._environment.read(
            lambda txn: np.array(
                [self._has(txn, key) and txn.get(key, db=self._db.quarantine) is None for key in pack_ids(ids)],
                np.bool_,
            )
        )

    def __len__(self) -> int:
        return self._environment.read(
            lambda txn: txn.stat(self._db.blocks)["entries"] - txn.stat(self._db.quarantine)["entries"]
        )

    def next_id(self) -> int:
        """See `Home.next_id`."""
        return self._environment.read(lambda txn: int(bytes(txn.get(b"next_id", b"0", db=self._db.home))))

    def find(self, texts: Sequence[str]) -> list[int | None]:
        """See `Home.find`. Also finds what is quarantined."""

        def work(txn: Reading) -> list[int | None]:
            keys = [txn.get(digest(text), db=self._db.digests) for text in texts]
            return [None if key is None else int.from_bytes(key, "big") for key in keys]

        return self._environment.read(work)

    def references(self, ids: Ids) -> list[Reference | None]:
        """See `Home.references`. Also those of what is quarantined."""

        def work(txn: Reading) -> list[Reference | None]:
            records = [txn.get(key, db=self._db.references) for key in pack_ids(ids)]
            return [None if record is None else unpack_reference(record) for record in records]

        return self._environment.read(work)

    def ids(self) -> Ids:
        """See `Home.ids`."""

        def work(txn: Reading) -> Ids:
            all_ids, bad = (
                unpack_ids(txn.cursor(db).iternext(values=False)) for db in (self._db.references, self._db.quarantine)
            )
            return np.setdiff1d(all_ids, bad, assume_unique=True)

        return self._environment.read(work)

    def ids_of(self, source: str) -> Ids:
        """See `Home.ids_of`. Also what is quarantined."""

        def work(txn: Reading) -> Ids:
            cursor = txn.cursor(self._db.members)
            return unpack_ids(cursor.iternext_dup() if cursor.set_key(digest(source)) else ())

        return self._environment.read(work)

    def sources(self) -> Mapping[str, int]:
        """See `Home.sources`. Counts what is quarantined too."""

        def work(txn: Reading) -> dict[str, int]:
            members, counts = txn.cursor(self._db.members), {}
            for key, source in txn.cursor(self._db.sources):
                members.set_key(key)
                counts[unpack_text(source)] = members.count()
            return counts

        return self._environment.read(work)

    def embeddings(self, ids: Ids | None = None, batch: int = 4096) -> Iterator[tuple[Ids, npt.NDArray[np.float32]]]:
        """See `Home.embeddings`. Given ids are found in quarantine too."""
        wanted = self.ids() if ids is None else ids
        for start in range(0, len(wanted), batch):
            some = wanted[start : start + batch]

            def work(txn: Reading, some: Ids = some) -> tuple[Ids, npt.NDArray[np.float32]]:
                values = [txn.get(key, db=self._db.embeddings) for key in pack_ids(some)]
                known = [value for value in values if value is not None]
                if len({len(value) for value in known}) > 1:
                    raise TierError(f"bank {self.path}: embeddings are not all of one length")
                vectors = np.frombuffer(b"".join(known), "<f4").astype(np.float32)
                found = np.array([value is not None for value in values], np.bool_)
                return some[found], vectors.reshape(len(known), -1 if known else 0)

            known_ids, vectors = self._environment.read(work)
            if len(known_ids):
                yield known_ids, vectors

    def quarantined(self) -> Mapping[int, str]:
        """See `Home.quarantined`."""
        return self._environment.read(
            lambda txn: {
                int.from_bytes(key, "big"): unpack_text(reason) for key, reason in txn.cursor(self._db.quarantine)
            }
        )

    def get_meta(self, key: str) -> bytes | None:
        """See `Home.get_meta`."""

        def work(txn: Reading) -> bytes | None:
            value = txn.get(pack_text(key), db=self._db.meta)
            return None if value is None else bytes(value)

        return self._environment.read(work)

    def stored_bytes(self) -> int:
        """See `Home.stored_bytes`. Room that forgetting left is used again and does not leave the file."""
        return self._environment.read(lambda _: self._environment.data.stat().st_size)

    def close(self) -> None:
        """See `Tier.close`. Waits for the calls that are running."""
        self._environment.close()

    def _has(self, txn: Reading | Writing, key: bytes) -> bool:
        """Whether a block is stored; a cursor, unlike `get`, does not read it."""
        return txn.cursor(self._db.blocks).set_key(key)


def _fill(row: Rows, block: memoryview) -> None:
    """Copy a stored block into a slot."""
    whole = unpack(block, len(row))
    stored = whole[: len(row)]
    row[: len(stored)] = stored
    # A record cut short must not be completed by what a former read left in the row.
    if len(stored) < HEADER_BYTES or length(row) != len(whole):
        row[len(stored) :] = 0
