"""Homes with one mistake each, in LMDB."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import lmdb
import numpy as np
import torch
from torch import Tensor

from m3backends.lmdb.files import HomeFiles
from m3backends.lmdb.home import LmdbHome
from m3runtime.documents.reference import Reference
from m3runtime.errors import InputError, TierClosedError, TierReadOnlyError
from m3runtime.memory.block import Found, Ids
from m3runtime.storage.home import Batch, Changes, Home
from m3runtime.storage.tier import check_rows
from m3runtime.testing.blocks import SLOT_BYTES, stored_bytes
from tests.backends.lmdb_contract import LmdbContract
from tests.testing.broken.suites import make_suites


class LosesTheLastCommit(LmdbHome):
    """What the last transaction wrote is undone by closing."""

    last: Ids | None = None

    def commit(self, batch: Batch, *, replacing: Ids | None = None, changes: Changes | None = None) -> None:
        super().commit(batch, replacing=replacing, changes=changes)
        self.last = batch.ids

    def close(self) -> None:
        last, self.last = self.last, None
        if last is not None:
            with suppress(TierClosedError):
                super().discard(last)
        super().close()


class DoesNotSync(LmdbHome):
    """Claims to be durable, and leaves it to the kernel when to write."""

    def __init__(self, *, path: Path, slot_bytes: int, read_only: bool) -> None:
        super().__init__(path=path, slot_bytes=slot_bytes, read_only=read_only, durability="relaxed")


class CommitsRowByRow(LmdbHome):
    def commit(self, batch: Batch, *, replacing: Ids | None = None, changes: Changes | None = None) -> None:
        if len(batch.references) != len(batch.ids):
            raise InputError("a reference for each id, please")
        parts = range(len(batch.ids)) if len(batch.ids) else [0]
        for row in parts:
            one = slice(row, row + 1)
            part = Batch(batch.ids[one], batch.blocks[one], batch.references[one], batch.embeddings[one])
            super().commit(part, replacing=replacing if row == 0 else None, changes=changes if row == 0 else None)


class ReplacesInTwoSteps(LmdbHome):
    def commit(self, batch: Batch, *, replacing: Ids | None = None, changes: Changes | None = None) -> None:
        if replacing is not None:
            self.discard(replacing)
        super().commit(batch, changes=changes)


class ReusesIds(LmdbHome):
    def next_id(self) -> int:
        ids = self.ids()
        return int(ids[-1]) + 1 if len(ids) else 0


class ForgetsQuarantineOnOpening(LmdbHome):
    def __init__(self, *, path: Path, slot_bytes: int, read_only: bool) -> None:
        super().__init__(path=path, slot_bytes=slot_bytes, read_only=read_only)
        if not read_only:
            self._environment.write(lambda txn: txn.drop(self._db.quarantine.handle, delete=False))


class BreaksTheLock(LmdbHome):
    """Takes a lock that is held for one that a dead process left."""

    def __init__(self, *, path: Path, slot_bytes: int, read_only: bool) -> None:
        HomeFiles(path).writer.unlink(missing_ok=True)
        super().__init__(path=path, slot_bytes=slot_bytes, read_only=read_only)


class ReadsWhatWasThereOnOpening(LmdbHome):
    def __init__(self, *, path: Path, slot_bytes: int, read_only: bool) -> None:
        super().__init__(path=path, slot_bytes=slot_bytes, read_only=read_only)
        self.known = super().ids() if read_only else None

    def ids(self) -> Ids:
        ids = super().ids()
        return ids if self.known is None else np.intersect1d(ids, self.known)


class SaysNothingWhenReadOnly(LmdbHome):
    def commit(self, batch: Batch, *, replacing: Ids | None = None, changes: Changes | None = None) -> None:
        with suppress(TierReadOnlyError):
            super().commit(batch, replacing=replacing, changes=changes)


class CompletesShortBlocks(LmdbHome):
    """Copies as many bytes as there are, and leaves the rest of the row to what was in it before."""

    def read(self, ids: Ids, out: Tensor) -> Found:
        rows = out.clone()
        found = super().read(ids, rows)
        with self._environment.env.begin(db=self._db.blocks) as txn:
            for row in np.flatnonzero(found).tolist():
                stored = txn.get(int(ids[row]).to_bytes(8, "big")) or b""
                out[row, : len(stored)] = rows[row, : len(stored)]
        return found


class AnotherIdsBytesOnceInAThousand(LmdbHome):
    reads = 0

    def read(self, ids: Ids, out: Tensor) -> Found:
        found = super().read(ids, out)
        for row in np.flatnonzero(found).tolist():
            self.reads += 1
            if self.reads % 1000 == 0:
                out[row] = out[row - 1].clone()
        return found


class KeepsMetadataForLater(LmdbHome):
    """Writes it with the next commit, or on closing."""

    def __init__(self, *, path: Path, slot_bytes: int, read_only: bool) -> None:
        self.later: dict[str, bytes] = {}
        super().__init__(path=path, slot_bytes=slot_bytes, read_only=read_only)

    def set_meta(self, key: str, value: bytes) -> None:
        if self._environment.read_only:
            super().set_meta(key, value)
        len(self)
        self.later[key] = value

    def get_meta(self, key: str) -> bytes | None:
        return self.later.get(key, super().get_meta(key))

    def close(self) -> None:
        while self.later:
            super().set_meta(*self.later.popitem())
        super().close()


class ClosedIsEmpty(LmdbHome):
    def contains(self, ids: Ids) -> Found:
        try:
            return super().contains(ids)
        except TierClosedError:
            return np.zeros(len(ids), np.bool_)


class ForgetsTheTextNot(LmdbHome):
    """Still finds the text of what was forgotten."""

    def __init__(self, *, path: Path, slot_bytes: int, read_only: bool) -> None:
        self.texts: dict[str, int] = {}
        super().__init__(path=path, slot_bytes=slot_bytes, read_only=read_only)

    def find(self, texts: Sequence[str], headings: Sequence[str] | None = None) -> list[int | None]:
        found = super().find(texts, headings)
        self.texts.update((text, id) for text, id in zip(texts, found, strict=True) if id is not None)
        return [self.texts.get(text) for text in texts]

    def commit(self, batch: Batch, *, replacing: Ids | None = None, changes: Changes | None = None) -> None:
        super().commit(batch, replacing=replacing, changes=changes)
        self.find([reference.text for reference in batch.references])


class EmbeddingsInOrderOfIds(LmdbHome):
    def embeddings(self, ids: Ids | None = None, batch: int = 4096) -> Iterator[tuple[Ids, Any]]:
        return super().embeddings(None if ids is None else np.sort(ids), batch)


class DiscardKeepsTheBlock(LmdbHome):
    """Its reference is gone, so nobody recalls it; its bytes are still read."""

    def discard(self, ids: Ids) -> None:
        rows = torch.zeros((len(ids), self.slot_bytes), dtype=torch.uint8)
        found = self.read(ids, rows)
        super().discard(ids)
        for row in np.flatnonzero(found).tolist():
            key, block = int(ids[row]).to_bytes(8, "big"), bytes(rows[row].tolist())
            self._environment.write(lambda txn, key=key, block=block: txn.put(key, block, db=self._db.blocks))  # type: ignore[misc]


class FillsWhatHasABlock(LmdbHome):
    """Takes the newest block of an id."""

    def fill(self, ids: Ids, blocks: Tensor) -> Found:
        found = super().fill(ids, blocks)
        rows = [row for row in range(len(ids)) if not found[row] and int(ids[row]) in self]
        for row in rows:
            key, block = int(ids[row]).to_bytes(8, "big"), stored_bytes(blocks[row])
            self._environment.write(lambda txn, key=key, block=block: txn.put(key, block, db=self._db.blocks))  # type: ignore[misc]
        return found


class FillsRowByRow(LmdbHome):
    def fill(self, ids: Ids, blocks: Tensor) -> Found:
        check_rows(ids, blocks, self.slot_bytes)
        rows = [super(FillsRowByRow, self).fill(ids[row : row + 1], blocks[row : row + 1]) for row in range(len(ids))]
        return np.array([row.all() for row in rows], np.bool_)


class ForgetsWhatIsColdOnOpening(LmdbHome):
    """Remembers only in RAM what it has in its catalogue alone."""

    def __init__(self, *, path: Path, slot_bytes: int, read_only: bool) -> None:
        super().__init__(path=path, slot_bytes=slot_bytes, read_only=read_only)
        if not read_only:
            self._environment.write(lambda txn: txn.drop(self._db.cold.handle, delete=False))


class KeepsTheFirstPlace(LmdbHome):
    def references(self, ids: Ids) -> list[Reference | None]:
        return [one and replace(one, places=one.places[:1]) for one in super().references(ids)]


class OneTextUnderAllHeadings(LmdbHome):
    """Takes a text for known whatever it stands under."""

    def find(self, texts: Sequence[str], headings: Sequence[str] | None = None) -> list[int | None]:
        found = zip(super().find(texts, headings), super().find(texts), strict=True)
        return [plain if here is None else here for here, plain in found]


class StatesWhatWasChanged(LmdbHome):
    """Goes on to vouch for a source that lost a reference."""

    def discard(self, ids: Ids) -> None:
        before = self.states()
        super().discard(ids)
        if before != self.states():
            self.change(Changes(states=before))


class ChangesAndThenCommits(LmdbHome):
    """Two transactions for one."""

    def commit(self, batch: Batch, *, replacing: Ids | None = None, changes: Changes | None = None) -> None:
        if changes is not None:
            self.change(changes)
        super().commit(batch, replacing=replacing)


class ListsTheFirstLastDay(LmdbHome):
    """Keeps a list of what expires that says of each reference when it begins to."""

    def expiring(self, before: str | None = None) -> Mapping[str, Ids]:
        seen, found = set[int](), dict[str, Ids]()
        for day, ids in super().expiring(before).items():
            found[day] = ids[[id not in seen for id in ids.tolist()]]
            seen |= set(ids.tolist())
        return {day: ids for day, ids in found.items() if len(ids)}


class LeavesPlacelessReferences(LmdbHome):
    """A reference that loses its last place stays as it was."""

    def change(self, changes: Changes) -> None:
        super().change(replace(changes, places={id: places for id, places in changes.places.items() if places}))


class IsAlwaysTheSame(LmdbHome):
    """Counts its own transactions, and not those of other processes."""

    def revision(self) -> int:
        return 7 * (super().revision() > 0)


class ColdIsHeld(LmdbHome):
    """Counts references without a block as blocks."""

    def __len__(self) -> int:
        return super().__len__() + len(self.cold())


class WidensByForgetting(LmdbHome):
    """Has larger slots, and none of the blocks that lay in the smaller ones."""

    def widen(self, slot_bytes: int) -> None:
        super().widen(slot_bytes)
        self._environment.write(lambda txn: txn.drop(self._db.blocks, delete=False))


class NarrowsSlots(LmdbHome):
    def widen(self, slot_bytes: int) -> None:
        self.slot_bytes = slot_bytes


class KeepsTheRestOfARow(LmdbHome):
    def read(self, ids: Ids, out: Tensor) -> Found:
        rows = torch.zeros_like(out)
        found = super().read(ids, rows)
        for row in np.flatnonzero(found).tolist():
            block = stored_bytes(rows[row])
            out[row, : len(block)] = rows[row, : len(block)]
        return found


class CompactsNothing(LmdbHome):
    def compact(self) -> None:
        self.set_meta("compacted", b"")


class CopiesPages(LmdbHome):
    """Leaves it to LMDB, which copies pages as they are."""

    def compact(self) -> None:
        def copy(env: lmdb.Environment, new: Path) -> None:
            with new.open("r+b") as file:
                env.copyfd(file.fileno(), compact=True)

        self._environment.replace(copy)


class CompactsWhatIsColdAway(LmdbHome):
    def compact(self) -> None:
        self.discard(self.cold())
        super().compact()


class Homes(LmdbContract):
    kind: ClassVar[type[LmdbHome]]

    def open(self, folder: Path, *, read_only: bool = False) -> Home:
        return self.kind(path=folder, slot_bytes=SLOT_BYTES, read_only=read_only)


BROKEN = LmdbHome.__subclasses__()
globals().update(make_suites(Homes, __name__, LmdbHome, BROKEN))
