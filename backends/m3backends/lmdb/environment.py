"""`Environment`: one open LMDB environment whose map grows by itself and whose errors are ours.

LMDB maps its file into memory at a fixed size. The map may be resized only while this process has no transaction open,
so every transaction goes through a guard that a resize waits for. A process that writes also maps the file anew from
time to time, so that the pages that it touched do not fill its memory.
"""

import os
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import lmdb

from m3backends.guard import Guard
from m3backends.lmdb.claim import Claim
from m3backends.lmdb.files import HomeFiles
from m3backends.lmdb.prefetch import Prefetch
from m3backends.lmdb.space import FIRST_MAP, Space
from m3runtime.config.units import format_size
from m3runtime.errors import BankBusyError, BankError, BankFullError, TierError, TierReadOnlyError
from m3runtime.storage.files import remove_remains, write_atomically

if TYPE_CHECKING:
    ReadTransaction = lmdb.Transaction[memoryview]
    WriteTransaction = lmdb.Transaction[bytes]
else:  # generic in its stub only
    ReadTransaction = WriteTransaction = lmdb.Transaction
T = TypeVar("T")
Durability = Literal["full", "commit", "relaxed"]


class Environment:
    """One open LMDB environment in a folder; see `HomeFiles` for the files in it.

    ``max_size`` bounds ``data.mdb`` in bytes; without it the drive does. ``durability`` is described by `LmdbHome`.
    Thread-safe, but no transaction may start inside another. One process writes, any number read. One process may
    open it only once, and not use it across a fork: then everything but `close` raises `TierError`.

    Raises `BankBusyError`, or `BankError` if the files cannot be opened, are not LMDB's, or are damaged.
    """

    def __init__(
        self,
        path: Path,
        *,
        databases: int,
        max_size: int | None,
        read_only: bool,
        durability: Durability,
        reopened: Callable[[], None],
    ) -> None:
        """``reopened`` is called when another file took the place of this one: handles of databases are void then.

        No transaction is open at that time, and none may begin through `read` or `write`.
        """
        self.path = path
        self.files = HomeFiles(path)
        self.read_only = read_only
        self._databases = databases
        self._durability = durability
        self._reopened = reopened
        self._guard = Guard(f"bank {path} is closed")
        self._process = os.getpid()
        self._open, self._sound, self._written = True, True, False
        self._space = Space(self.files, self._guard, max_size, sync=durability == "full")
        self._claim = Claim(self.files, read_only=read_only)
        try:
            if not read_only:
                remove_remains(self.files.data.resolve())  # of a compaction that was killed
            self.env = self._open_env()
            if not read_only:
                self._space.fill_up(self.env)
        except (lmdb.Error, OSError) as error:
            self._claim.release()
            if "already open in this process" in str(error):
                raise BankBusyError(f"bank {path} is already open in this process; use that, or close it") from error
            raise BankError(f"bank {self.files.data}: {error}") from error

    def read(self, work: Callable[[ReadTransaction], T]) -> T:
        """Run ``work`` on one snapshot. Its memoryviews are dead once it returned. Raises `TierError`."""
        self._check_process()
        while True:
            if self.read_only and self._is_replaced():
                self._adopt()
            with self._guard.shared():
                size = self.env.info()["map_size"]
                try:
                    with self.env.begin(buffers=True) as txn:
                        result = work(txn)
                    break
                except lmdb.MapResizedError:
                    pass
                except lmdb.Error as error:
                    raise TierError(f"bank {self.path}: {error}") from error
            self._space.adopt(self.env, size)
        if not self.read_only:
            self._space.trim(self.env)
        return result

    def write(self, work: Callable[[WriteTransaction], T], *, need: int = 0, reserve: bool = False) -> T:
        """Run ``work`` in a write transaction: durable on return as configured, and undone by any exception.

        ``work`` runs again after the map had to grow. ``need`` is an estimate of the bytes that it writes. With
        ``reserve`` it may use the last part of a bounded file, which is kept for forgetting: that, too, writes
        before it frees.

        Raises `BankFullError`, `TierReadOnlyError` or `TierError`.
        """
        self._check_process()
        if self.read_only:
            raise TierReadOnlyError(f"bank {self.path} was opened for reading")
        turned = grown = False
        while True:
            with self._guard.shared():
                if not self._written:
                    self.files.drop_verified()
                    self._written = True
                size = self.env.info()["map_size"]
                try:
                    with self.env.begin(write=True) as txn:
                        result = work(txn)
                    self._space.fill_up(self.env)
                    break
                except lmdb.MapFullError:
                    pass
                except (lmdb.Error, OSError) as error:
                    if self._space.is_drive_full(error, need):
                        raise BankFullError(f"bank {self.path} is full: its drive has no room left") from error
                    self._sound = False
                    raise TierError(f"bank {self.path}: {error}") from error
            if self._space.grow(self.env, size, need, reserve=reserve):
                grown = True
            else:
                if turned:
                    raise self._space.full_error()
                self._space.turn(self.env)
                turned = True
        if reserve and grown:
            self._space.restore_reserve(self.env)
        self._space.trim(self.env)
        return result

    def replace(self, fill: Callable[[lmdb.Environment, Path], None]) -> None:
        """Put the file that ``fill`` makes in the place of this one, whole or not at all, while no thread reads.

        ``fill`` gets this environment and the path of an empty file. Raises `BankFullError` if the drive has no room
        for both files, `TierReadOnlyError` or `TierError`.
        """
        self._check_process()
        if self.read_only:
            raise TierReadOnlyError(f"bank {self.path} was opened for reading")
        with self._guard.alone():
            data = self.files.data.resolve()  # which may lie on another drive
            before = data.stat()

            def make(new: Path) -> None:
                fill(self.env, new)
                if hasattr(os, "chown"):
                    with suppress(PermissionError):
                        os.chown(new, before.st_uid, before.st_gid)
                self._close_env()

            try:
                self.files.drop_verified()
                write_atomically(data, make, mode=stat.S_IMODE(before.st_mode))
            except (lmdb.Error, OSError) as error:
                if self._space.is_drive_full(error, before.st_size):
                    raise BankFullError(
                        f"bank {self.path}: its drive has no room for a second copy of its records, at most "
                        f"{format_size(before.st_size)}, which compaction needs; make room and compact it again"
                    ) from error
                raise TierError(f"bank {self.path} cannot be compacted: {error}") from error
            finally:
                self._reopen()
                self._written = True

    def at_rest(self, work: Callable[[], T]) -> T | None:
        """Run ``work`` while no process writes to the file; None if another process may. Raises `TierError`."""
        self._check_process()
        with self._guard.shared():
            if self.read_only:
                return self._claim.at_rest(work)
            try:
                with self.env.begin(write=True):
                    return work()
            except lmdb.Error as error:
                raise TierError(f"bank {self.path}: {error}") from error

    @property
    def is_doubtful(self) -> bool:
        """Was the file verified just now, because no stamp fitted it? Its records wait for a check and `confirm`."""
        return self._claim.verified is not None

    def confirm(self) -> None:
        """Stamp the file, as it was when it was opened, as whole for the next process that opens it."""
        if self._claim.verified is not None:
            self.files.set_verified(self._claim.verified)

    def close(self) -> None:
        """Wait for running transactions, make all commits durable, and close. Closing twice is fine.

        In a process that forked since, only what that process inherited is released, so that it can open the bank
        anew. Raises `TierError` if the drive does not take what was committed; the environment is closed all the same.
        """
        if os.getpid() != self._process:
            self._close_env()
            self._claim.release()
            return
        with self._guard.alone(closing=True):
            if not self._open:
                return
            self._open = False
            try:
                if self._written and self._durability != "full":
                    self.env.sync(True)
            except lmdb.Error as error:
                self._sound = False
                raise TierError(f"bank {self.path}: {error}") from error
            finally:
                self._close_env()
                if self._written and self._sound:
                    self.files.set_verified(self.files.state())
                self._claim.release()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise TierError(f"bank {self.path} was opened before this process forked; open it anew in this one")

    def _is_replaced(self) -> bool:
        """Was another file put in the place of this one, by a compaction?"""
        return self.files.identity() not in (self._identity, None)

    def _adopt(self) -> None:
        """Open the file that took the place of this one."""
        with self._guard.alone():
            if self._is_replaced():
                claim = Claim(self.files, read_only=True)
                self._claim.release()
                self._claim = claim
                self._reopen()

    def _reopen(self) -> None:
        self._close_env()
        try:
            self.env = self._open_env()
            if not self.read_only:
                self._space.fill_up(self.env)
            self._reopened()
        except (lmdb.Error, OSError) as error:
            raise BankError(f"bank {self.files.data}: {error}") from error

    def _open_env(self) -> lmdb.Environment:
        self._identity = self.files.identity()  # before it is opened, so that no other file can come in between unseen
        env = lmdb.Environment(
            str(self.path),
            map_size=min(FIRST_MAP, self._space.limit()),  # LMDB raises it to what is in use
            max_dbs=self._databases,
            max_readers=1024,
            readonly=self.read_only,
            create=not self.read_only,
            lock=self._claim.registers or not self.read_only,
            metasync=self._durability == "full",
            sync=self._durability != "relaxed",
            lib_version=0,  # the format that `check_structure` knows
        )
        try:
            env.reader_check()  # readers that were killed would keep freed pages from being used again
            self.prefetch = Prefetch(self.files.data, env.stat()["psize"])
        except BaseException:
            env.close()
            raise
        return env

    def _close_env(self) -> None:
        self.env.close()
        self.prefetch.close()
