"""An LMDB environment that grows by itself, that one process writes, and whose errors are ours.

LMDB maps its file into memory at a fixed size. The map may be resized only while this process has no
transaction open, so every transaction goes through a guard that a resize waits for.
"""

import errno
import mmap
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import lmdb

from m3backends.lmdb.claim import Claim
from m3backends.lmdb.files import HomeFiles
from m3backends.lmdb.guard import Guard
from m3runtime.errors import BankBusyError, BankError, BankFullError, TierClosedError, TierError, TierReadOnlyError

if TYPE_CHECKING:
    Reading = lmdb.Transaction[memoryview]
    Writing = lmdb.Transaction[bytes]
else:  # generic in its stub only
    Reading = Writing = lmdb.Transaction
T = TypeVar("T")
Durability = Literal["full", "commit", "relaxed"]

FIRST_MAP = 64 << 20
_RESERVE = 1 << 20
_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


class Environment:
    """One open LMDB environment in a folder: see `HomeFiles` for what lies there.

    ``max_size`` bounds ``data.mdb`` in bytes; without it the drive does. ``durability`` is what `LmdbHome` says.
    Thread-safe, but no transaction may be started inside another. One process writes, any number read; one process
    has it open only once, and not across a fork: then everything but `close` raises `TierError`.

    Raises `BankBusyError`, or `BankError` if the files cannot be opened, are not LMDB's, or are damaged.
    """

    def __init__(
        self, path: Path, *, databases: int, max_size: int | None, read_only: bool, durability: Durability
    ) -> None:
        self.path = path
        self.files = HomeFiles(path)
        self.read_only = read_only
        self._durability = durability
        self._max_size = max_size
        self._guard = Guard(f"bank {path} is closed")
        self._process = os.getpid()
        self._open, self._sound, self._written = True, True, False
        self._claim = Claim(self.files, read_only=read_only)
        try:
            self._env = self._open_env(databases)
            if not read_only:
                self._fill_up()
        except (lmdb.Error, OSError) as error:
            self._claim.release()
            if "already open in this process" in str(error):
                raise BankBusyError(f"bank {path} is already open in this process; use that, or close it") from error
            raise BankError(f"bank {self.files.data}: {error}") from error

    def read(self, work: Callable[[Reading], T]) -> T:
        """Run ``work`` on one snapshot. Its memoryviews are dead once it returned. Raises `TierError`."""
        self._check_process()
        while True:
            with self._guard.shared():
                size = self._env.info()["map_size"]
                try:
                    with self._env.begin(buffers=True) as txn:
                        return work(txn)
                except lmdb.MapResizedError:
                    pass
                except lmdb.Error as error:
                    raise TierError(f"bank {self.path}: {error}") from error
            self._adopt(size)

    def write(self, work: Callable[[Writing], T], *, need: int = 0, reserve: bool = False) -> T:
        """Run ``work`` in a write transaction, as durable on return as was asked for; after any exception nothing was.

        Runs it again after the map had to grow. ``need`` is about how many bytes it writes. ``reserve``
        lets it use the last of a bounded environment, which is kept for forgetting: that, too, writes
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
                size = self._env.info()["map_size"]
                try:
                    with self._env.begin(write=True) as txn:
                        result = work(txn)
                    self._fill_up()
                    break
                except lmdb.MapFullError:
                    pass
                except (lmdb.Error, OSError) as error:
                    if self._no_room(error, need):
                        raise BankFullError(f"bank {self.path} is full: its drive has no room left") from error
                    self._sound = False
                    raise TierError(f"bank {self.path}: {error}") from error
            if self._grow(size, need, reserve):
                grown = True
            else:
                if turned:
                    raise BankFullError(self._why_full())
                self._turn()
                turned = True
        if reserve and grown:
            self._shrink()
        return result

    def at_rest(self, work: Callable[[], T]) -> T | None:
        """Run ``work`` while nobody writes to the file, or return None where another process does.

        Raises `TierError`.
        """
        self._check_process()
        with self._guard.shared():
            if self.read_only:
                return self._claim.at_rest(work)
            try:
                with self._env.begin(write=True):
                    return work()
            except lmdb.Error as error:
                raise TierError(f"bank {self.path}: {error}") from error

    @property
    def is_doubtful(self) -> bool:
        """Whether the file was not known to be whole: its pages are, and `confirm` waits for its records."""
        return self._claim.verified is not None

    def confirm(self) -> None:
        """State that the file is whole as it was when it was opened, for the next who opens it."""
        if self._claim.verified is not None:
            self.files.set_verified(self._claim.verified)

    @property
    def env(self) -> lmdb.Environment:
        """LMDB's own object, to open databases with."""
        return self._env

    def close(self) -> None:
        """Wait for the transactions that are running, make all durable, and close. Closing twice is fine.

        In a process that forked since, this gives back only what that process has of it, so that it can be opened anew.
        Raises `TierError` if the drive does not take what was committed; closed it is all the same.
        """
        if os.getpid() != self._process:
            self._env.close()
            self._claim.release()
            return
        with self._guard.alone(closing=True):
            if not self._open:
                return
            self._open = False
            try:
                if self._written and self._durability != "full":
                    self._env.sync(True)
            except lmdb.Error as error:
                self._sound = False
                raise TierError(f"bank {self.path}: {error}") from error
            finally:
                self._env.close()
                if self._written and self._sound:
                    self.files.set_verified(self.files.state())
                self._claim.release()

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise TierError(f"bank {self.path} was opened before this process forked; open it anew in this one")

    def _open_env(self, databases: int) -> lmdb.Environment:
        env = lmdb.Environment(
            str(self.path),
            map_size=min(FIRST_MAP, self._limit(reserve=False)),  # LMDB raises it to what is in use
            max_dbs=databases,
            max_readers=1024,
            readonly=self.read_only,
            create=not self.read_only,
            lock=self._claim.registers or not self.read_only,
            metasync=self._durability == "full",
            sync=self._durability != "relaxed",
            lib_version=0,  # the format that `check_structure` knows
        )
        env.reader_check()  # readers that were killed would keep freed pages from being used again
        return env

    def _limit(self, *, reserve: bool) -> int:
        """Bytes that the map may have."""
        if self._max_size is None:
            stored = self.files.data.stat().st_size if self.files.data.exists() else 0
            limit = stored + shutil.disk_usage(self.path).free
        else:
            limit = self._max_size - (0 if reserve else min(_RESERVE, self._max_size // 16))
        return limit - limit % mmap.PAGESIZE

    def _grow(self, size: int, need: int, reserve: bool) -> bool:
        """Grow the map beyond ``size``; false at the limit."""
        with self._guard.alone():
            now = self._env.info()["map_size"]
            limit = self._limit(reserve=reserve)
            if now <= size < limit:
                self._env.set_mapsize(min(limit, max(2 * size, size + need)))
            return now > size or size < limit

    def _shrink(self) -> None:
        """Take the reserve back out of the map, so that it stays a reserve."""
        with suppress(TierClosedError), self._guard.alone():  # what was committed is committed
            if self._env.info()["map_size"] > (limit := self._limit(reserve=False)):
                self._env.set_mapsize(limit)  # never less than what is in use

    def _adopt(self, size: int) -> None:
        """The writer grew the file beyond ``size``: map more. What the file itself says of its map is not trusted."""
        with self._guard.alone():
            if self._env.info()["map_size"] <= size:
                try:
                    self._env.set_mapsize(2 * size)  # never less than what is in use
                except lmdb.Error as error:
                    raise TierError(f"bank {self.path}: {error}") from error

    def _turn(self) -> None:
        """Commit an empty transaction: pages freed by one are reused by the next but one."""
        try:
            with self._guard.shared(), self._env.begin(write=True) as txn:
                txn.put(b"\0turn", b"")
                txn.delete(b"\0turn")
        except lmdb.MapFullError:  # then there is no such page
            return

    def _why_full(self) -> str:
        if self._max_size is None:
            return f"bank {self.path} is full: its drive has no room left"
        return (
            f"bank {self.path} is full: its limit of {show_bytes(self._max_size)} is reached; "
            "raise `max_size` of the lmdb tier or forget some references"
        )

    def _no_room(self, error: Exception, need: int) -> bool:
        """Whether an error means a full drive. LMDB reports a short write as EIO: then ask the drive."""
        code = error.errno if isinstance(error, OSError) else getattr(error, "code", 0)
        if code != errno.EIO:
            return code in _NO_ROOM
        try:
            self._allocate(self.files.data.stat().st_size, max(need, _RESERVE))
        except OSError as refused:
            return refused.errno in _NO_ROOM
        return False

    def _allocate(self, start: int, size: int) -> None:
        """Make ``data.mdb`` have these bytes; those it has already keep their content."""
        if not hasattr(os, "posix_fallocate"):  # macOS and Windows
            return
        file = os.open(self.files.data, os.O_RDWR)
        try:
            os.posix_fallocate(file, start, size)
            if self._durability == "full":  # where the file system cannot, it is written
                os.fsync(file)
        finally:
            os.close(file)

    def _fill_up(self) -> None:
        """Give the file the pages that LMDB counts but has not written, so that none is read beyond its end."""
        size = self.files.data.stat().st_size
        in_use = (self._env.info()["last_pgno"] + 1) * self._env.stat()["psize"]
        if (short := in_use - size) > 0:
            with suppress(OSError):  # what was committed is whole without them
                self._allocate(size, short)


def show_bytes(size: int) -> str:
    """A size as the configuration writes it, such as ``64MiB``."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if size >= 1024**power and size % 1024**power == 0:
            return f"{size // 1024**power}{unit}"
    return f"{size}B"
