"""`SlotFile`: equal slots in one file, and a table in LMDB of the blocks that they hold.

::

    lmdb-cache     says that the folder is a cache, and of which form; without it nothing here is touched
    blocks         the slots, one after the other; never longer than all of them
    data.mdb       LMDB's pages: the table
    cache.lock     held by the process that has the cache open
    lock.mdb, verified, writer.lock, opening.lock     see `HomeFiles`

The table maps a slot to the id whose block it holds, or to nothing: then its bytes are not known, and are erased when
the cache is opened. A slot that is not in the table is empty. LMDB holds no block itself: a deleted record stays in its
file until the page is used again, while a slot can be erased where it lies, and never makes holes of other sizes.

A table is written before and after the bytes, so that a process that is killed leaves no slot under a wrong id. Nothing
is synced but what was erased: after a power cut the table is verified, and each block has its digest.
"""

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import lmdb
import numpy as np

from m3backends.lmdb.claim import take
from m3backends.lmdb.environment import Environment, WriteTransaction
from m3runtime.errors import BankBusyError, BankError, ConfigError, TierError
from m3runtime.memory.block import Rows
from m3runtime.storage.files import write_atomically

if TYPE_CHECKING:
    from filelock import BaseFileLock

_MARK = "lmdb-cache"
_FORM = b"1\n"
_DATABASE = b"slots"
_OF = b"of"
"""The key of what the slots are: their size and their bank."""
_UNKNOWN = b""


class SlotFile:
    """The open slots of a cache, in a folder of its own. For one thread at a time, but for `read`.

    Raises `TierError` if another process has it open, or the drive fails, and `ConfigError` for a folder of something
    else. A cache of another bank, or of slots of another size, or a damaged one, is thrown away and begun anew.
    """

    def __init__(self, folder: Path, slot_bytes: int, slots: int, bank: str) -> None:
        self._folder = folder
        self._slot_bytes = slot_bytes
        self._of = f"{slot_bytes} {bank}".encode()
        self._blocks: int | None = None
        self._table: Environment | None = None
        self._lock: BaseFileLock | None = None
        self.held: dict[int, int] = {}
        """The slot of each id."""
        try:
            self._claim()
            try:
                self._open(slots)
            except BankBusyError:
                raise
            except (BankError, TierError, lmdb.Error, ValueError):
                self._close_files()
                self._begin_anew()
                self._open(slots)
        except (BankError, lmdb.Error, OSError) as error:
            self.close()
            raise TierError(f"cache {folder}: {error}") from error
        except BaseException:
            self.close()
            raise

    def read(self, slots: Sequence[int], rows: Sequence[Rows]) -> None:
        """Read whole slots into rows. Any number of threads may, of slots that none fills. Raises `TierError`."""
        assert self._blocks is not None
        try:
            if hasattr(os, "posix_fadvise") and len(slots) > 1:
                for slot in slots:  # the drive reads all of them at once
                    os.posix_fadvise(self._blocks, slot * self._slot_bytes, self._slot_bytes, os.POSIX_FADV_WILLNEED)
            for slot, row in zip(slots, rows, strict=True):
                if os.preadv(self._blocks, [row.data], slot * self._slot_bytes) != self._slot_bytes:
                    raise TierError(f"cache {self._folder}: its file of blocks was cut")
        except OSError as error:
            raise TierError(f"cache {self._folder}: {error}") from error

    def fill(self, filled: Mapping[int, tuple[int, Rows]]) -> None:
        """Fill slots with blocks, given with their ids. Raises `TierError`: then the bytes of these slots are unknown.

        Whatever they held before is held no longer from the beginning on.
        """
        self._state(dict.fromkeys(filled, _UNKNOWN))
        for slot, (_, row) in filled.items():
            self._write(slot, row)
        self._state({slot: id.to_bytes(8, "big") for slot, (id, _) in filled.items()})

    def erase(self, slots: Sequence[int]) -> None:
        """Empty slots, and leave no byte of what they held on the drive. Raises `TierError`; try it again then."""
        assert self._blocks is not None
        if not slots:
            return
        self._state(dict.fromkeys(slots, _UNKNOWN))
        for slot in slots:
            self._write(slot, np.zeros(self._slot_bytes, np.uint8))
        try:
            os.fdatasync(self._blocks) if hasattr(os, "fdatasync") else os.fsync(self._blocks)
        except OSError as error:
            raise TierError(f"cache {self._folder}: {error}") from error
        self._state(dict.fromkeys(slots))

    def close(self) -> None:
        """Close and sync the files, and let other processes open the cache. Closing twice is fine."""
        self._close_files()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _claim(self) -> None:
        mark = self._folder / _MARK
        if self._folder.exists() and not mark.exists() and any(self._folder.iterdir()):
            raise ConfigError(
                f"{self._folder} is no cache of blocks: name a new folder as `path` of the lmdb-cache tier"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        if not mark.exists():
            write_atomically(mark, _FORM)
        self._lock = take(self._folder / "cache.lock")
        if self._lock is None:
            raise TierError(f"cache {self._folder} is open in another process; give each a folder of its own")
        if mark.read_bytes() != _FORM:
            self._begin_anew()
            write_atomically(mark, _FORM)

    def _open(self, slots: int) -> None:
        """Open the files and read the table. Raises many errors for damage."""
        self._table = Environment(
            self._folder, databases=1, max_size=None, read_only=False, durability="relaxed", reopened=lambda: None
        )
        self._database = self._table.env.open_db(_DATABASE)
        self._blocks = os.open(self._folder / "blocks", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)

        def look(txn: WriteTransaction) -> dict[int, int | None]:
            if txn.get(_OF, self._of, db=self._database) != self._of:
                raise ValueError("slots of another size, or another bank's")
            txn.put(_OF, self._of, db=self._database)
            found = dict[int, int | None]()
            for key, value in txn.cursor(self._database):
                if len(key) == 8:
                    found[int.from_bytes(key, "big")] = int.from_bytes(value, "big") if len(value) == 8 else None
            return found

        there = self._table.write(look)
        self.held = {id: slot for slot, id in there.items() if id is not None and slot < slots}
        room = os.fstat(self._blocks).st_size // self._slot_bytes
        self.held = {id: slot for id, slot in self.held.items() if slot < room}
        kept = set(self.held.values())
        if room > slots:
            os.ftruncate(self._blocks, slots * self._slot_bytes)
        self._state(dict.fromkeys(slot for slot in there if slot >= min(slots, room)))
        self.erase([slot for slot in there if slot < min(slots, room) and slot not in kept])

    def _begin_anew(self) -> None:
        for path in self._folder.iterdir():
            if path.name in ("data.mdb", "lock.mdb", "verified", "blocks"):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _state(self, slots: Mapping[int, bytes | None]) -> None:
        """Put slots into the table, or take out those that map to None. Raises `TierError`."""
        assert self._table is not None

        def work(txn: WriteTransaction) -> None:
            for slot, value in slots.items():
                key = slot.to_bytes(8, "big")
                if value is None:
                    txn.delete(key, db=self._database)
                else:
                    txn.put(key, value, db=self._database)

        if slots:
            try:
                self._table.write(work, need=64 * len(slots))
            except BankError as error:
                raise TierError(f"cache {self._folder}: {error}") from error

    def _write(self, slot: int, row: Rows) -> None:
        assert self._blocks is not None
        try:
            if os.pwrite(self._blocks, row.data, slot * self._slot_bytes) != self._slot_bytes:
                raise TierError(f"cache {self._folder}: its drive has no room left")
        except OSError as error:
            raise TierError(f"cache {self._folder}: {error}") from error

    def _close_files(self) -> None:
        blocks, self._blocks = self._blocks, None
        table, self._table = self._table, None
        self.held = {}
        if blocks is not None:
            with suppress(OSError):  # a cache: what does not reach the drive fails its check
                os.fsync(blocks)
            os.close(blocks)
        if table is not None:
            table.close()
