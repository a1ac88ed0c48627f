"""The files of an LMDB home: what may lie in their places, and the stamp that says one was found whole.

::

    data.mdb       LMDB's pages
    lock.mdb       LMDB's table of readers
    verified       size, time and inode of data.mdb when its structure was last known to be whole
    writer.lock    held by the process that may write
    opening.lock   held while a process finds out whether data.mdb can be trusted
"""

import os
import stat
from contextlib import suppress
from pathlib import Path

import xxhash

from m3runtime.errors import BankError
from m3runtime.storage.files import sync_folder

SMALL = 256 << 20
"""Bytes of a ``data.mdb`` whose structure is checked at every opening, which mostly takes milliseconds: what rots on a
drive leaves the stamp as it was. In larger ones `m3 verify` finds such damage."""
_LARGEST_TABLE = 1 << 20
"""LMDB's table takes 64 bytes for each of at most 1,024 readers, and is mapped as long as it is."""
_SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
"""Follow no link, wait for no pipe."""


class HomeFiles:
    """The paths of a home in a folder, and its stamp. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data.mdb"
        self.table = folder / "lock.mdb"
        self.stamp = folder / "verified"
        self.writer = folder / "writer.lock"
        self.opening = folder / "opening.lock"

    def check(self) -> None:
        """Raise `BankError` for what LMDB must not open: it would wait for a pipe, and write where a link points.

        ``data.mdb`` may be a link to a regular file, as of a bank that was moved to another drive.
        """
        if os.path.lexists(self.data) and not self.data.is_file():
            raise BankError(f"bank {self.data} is not a regular file, or a link to one that is gone; restore it")
        with suppress(FileNotFoundError):
            table = self.table.lstat()
            if not stat.S_ISREG(table.st_mode) or table.st_size > _LARGEST_TABLE:
                raise BankError(f"bank {self.table} is not LMDB's; remove it while nobody has the bank open")

    def can_register(self) -> bool:
        """Whether LMDB can note its readers, so that a writer leaves alone what they read."""
        return os.access(self.table if self.table.exists() else self.folder, os.W_OK)

    def is_empty(self) -> bool:
        """Whether nothing was ever written."""
        return not self.data.exists() or not self.data.stat().st_size

    def is_verified(self) -> bool:
        """Whether ``data.mdb`` is as it was when `set_verified` was called. A damaged stamp says no."""
        try:
            handle = os.open(self.stamp, os.O_RDONLY | _SAFELY)
            try:
                regular = stat.S_ISREG(os.fstat(handle).st_mode)
                return regular and os.read(handle, 256) == self.state()
            finally:
                os.close(handle)
        except OSError:
            return False

    def is_trusted(self) -> bool:
        """Whether LMDB may open ``data.mdb`` without another look at its structure."""
        return self.data.exists() and self.data.stat().st_size > SMALL and self.is_verified()

    def set_verified(self, state: bytes) -> None:
        """State that ``data.mdb`` was whole in this `state`. Without leave to write, it is not stated."""
        with suppress(OSError):
            handle = os.open(self.stamp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _SAFELY, 0o644)
            try:
                os.write(handle, state)
                os.fsync(handle)
            finally:
                os.close(handle)

    def drop_verified(self) -> None:
        """Withdraw it before writing: after a power cut an old stamp might otherwise fit a torn file."""
        with suppress(OSError):
            self.stamp.unlink()
            sync_folder(self.folder)

    def state(self) -> bytes:
        """What tells ``data.mdb`` as it is from what it was or will be, and a digest of that."""
        of = self.data.stat()
        state = f"{of.st_size} {of.st_mtime_ns} {of.st_ino}"
        return f"{state} {xxhash.xxh3_64_hexdigest(state.encode())}\n".encode()
