"""`Space`: the size of an LMDB map, and the room on the drive behind it."""

import errno
import mmap
import os
import shutil
from contextlib import suppress

import lmdb

from m3backends.guard import Guard
from m3backends.lmdb.files import HomeFiles
from m3backends.lmdb.residency import Residency
from m3runtime.config.units import format_size
from m3runtime.errors import BankFullError, TierClosedError, TierError

FIRST_MAP = 64 << 20
_RESERVE = 1 << 20
_NO_ROOM = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


class Space:
    """Grows the map of one environment up to ``max_size`` bytes, or to what the drive has room for.

    The last part of a bounded map is a reserve for forgetting. Thread-safe; methods that resize wait until no
    transaction is open.
    """

    def __init__(self, files: HomeFiles, guard: Guard, max_size: int | None, *, sync: bool) -> None:
        """``sync``: bytes that are allocated reach the drive before they are used."""
        self._files = files
        self._guard = guard
        self._max_size = max_size
        self._sync = sync
        self._residency = Residency()

    def limit(self, *, reserve: bool = False) -> int:
        """The largest size of the map in bytes, with or without the reserve."""
        if self._max_size is None:
            stored = self._files.data.stat().st_size if self._files.data.exists() else 0
            limit = stored + shutil.disk_usage(self._files.folder).free
        else:
            limit = self._max_size - (0 if reserve else min(_RESERVE, self._max_size // 16))
        return limit - limit % mmap.PAGESIZE

    def grow(self, env: lmdb.Environment, size: int, need: int, *, reserve: bool) -> bool:
        """Grow the map beyond ``size`` bytes; false at the limit."""
        with self._guard.alone():
            now = env.info()["map_size"]
            limit = self.limit(reserve=reserve)
            if now <= size < limit:
                env.set_mapsize(min(limit, max(2 * size, size + need)))
            return now > size or size < limit

    def restore_reserve(self, env: lmdb.Environment) -> None:
        """Take the reserve back out of the map after it was used."""
        with suppress(TierClosedError), self._guard.alone():  # what was committed is committed
            if env.info()["map_size"] > (limit := self.limit()):
                env.set_mapsize(limit)  # never less than what is in use

    def adopt(self, env: lmdb.Environment, size: int) -> None:
        """Map more than ``size`` bytes, because the writer grew the file. The size in the file is not trusted."""
        with self._guard.alone():
            if env.info()["map_size"] <= size:
                self._map(env, 2 * size)

    def trim(self, env: lmdb.Environment) -> None:
        """Map the file anew if much of it came into memory: see `Residency`."""
        if self._residency.is_high():
            with suppress(TierClosedError), self._guard.alone():  # what was committed is committed
                self._map(env, env.info()["map_size"])
            self._residency.reset()

    def _map(self, env: lmdb.Environment, size: int) -> None:
        try:
            env.set_mapsize(size)  # never less than what is in use
        except lmdb.Error as error:
            raise TierError(f"bank {self._files.folder}: {error}") from error

    def turn(self, env: lmdb.Environment) -> None:
        """Commit an empty transaction: pages freed by one are reused by the next but one."""
        try:
            with self._guard.shared(), env.begin(write=True) as txn:
                txn.put(b"\0turn", b"")
                txn.delete(b"\0turn")
        except lmdb.MapFullError:  # then no page is free
            return

    def full_error(self) -> BankFullError:
        """The error for a map that cannot grow."""
        if self._max_size is None:
            return BankFullError(f"bank {self._files.folder} is full: its drive has no room left")
        return BankFullError(
            f"bank {self._files.folder} is full: its limit of {format_size(self._max_size)} is reached; "
            "raise `max_size` of the lmdb tier or forget some references"
        )

    def is_drive_full(self, error: Exception, need: int) -> bool:
        """Does an error mean a full drive? LMDB reports a short write as EIO: then the drive is asked."""
        code = error.errno if isinstance(error, OSError) else getattr(error, "code", 0)
        if code != errno.EIO:
            return code in _NO_ROOM
        try:
            self._allocate(self._files.data.stat().st_size, max(need, _RESERVE))
        except OSError as refused:
            return refused.errno in _NO_ROOM
        return False

    def fill_up(self, env: lmdb.Environment) -> None:
        """Give the file the pages that LMDB counts but has not written, so that none is read beyond its end."""
        size = self._files.data.stat().st_size
        in_use = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
        if (short := in_use - size) > 0:
            with suppress(OSError):  # what was committed is whole without them
                self._allocate(size, short)

    def _allocate(self, start: int, size: int) -> None:
        """Give ``data.mdb`` these bytes; those that it has keep their content."""
        if not hasattr(os, "posix_fallocate"):  # macOS and Windows
            return
        file = os.open(self._files.data, os.O_RDWR)
        try:
            os.posix_fallocate(file, start, size)
            if self._sync:  # where the file system cannot, it is written
                os.fsync(file)
        finally:
            os.close(file)
