"""`HomeFiles`: the files of an LMDB home, and the stamp that says that ``data.mdb`` was found whole.

::

    data.mdb       LMDB's pages
    lock.mdb       LMDB's table of readers
    verified       size, time, inode and, unless it is large, the content's digest of data.mdb when it was last known
                   to be whole
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
"""A ``data.mdb`` up to this many bytes is stamped with a digest of its content, which takes milliseconds: bits that rot
on a drive leave size, time and inode as they were. In larger files `m3 verify` finds such damage."""
_PIECE = 1 << 20
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
        """Raise `BankError` for files that LMDB must not open: it would wait for a pipe, and write through a link.

        ``data.mdb`` may be a link to a regular file, for a bank that was moved to another drive.
        """
        if os.path.lexists(self.data) and not self.data.is_file():
            raise BankError(f"bank {self.data} is not a regular file, or a link to one that is gone; restore it")
        with suppress(FileNotFoundError):
            table = self.table.lstat()
            if not stat.S_ISREG(table.st_mode) or table.st_size > _LARGEST_TABLE:
                raise BankError(f"bank {self.table} is not LMDB's; remove it while nobody has the bank open")

    def can_register(self) -> bool:
        """Can LMDB register its readers, so that a writer leaves alone what they read?"""
        return os.access(self.table if self.table.exists() else self.folder, os.W_OK)

    def is_empty(self) -> bool:
        """Was nothing ever written?"""
        return not self.data.exists() or not self.data.stat().st_size

    def is_verified(self) -> bool:
        """Is ``data.mdb`` as it was at `set_verified`, so that LMDB may open it? A damaged stamp says no."""
        try:
            handle = os.open(self.stamp, os.O_RDONLY | _SAFELY)
            try:
                stamp = os.read(handle, 256) if stat.S_ISREG(os.fstat(handle).st_mode) else b""
            finally:
                os.close(handle)
            return stamp.startswith(self._outside()) and stamp == self.state()  # a digest takes longer
        except OSError:
            return False

    def set_verified(self, state: bytes) -> None:
        """Stamp ``data.mdb`` as whole in this `state`. Does nothing where the stamp cannot be written."""
        with suppress(OSError):
            handle = os.open(self.stamp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | _SAFELY, 0o644)
            try:
                os.write(handle, state)
                os.fsync(handle)
            finally:
                os.close(handle)

    def drop_verified(self) -> None:
        """Remove the stamp before writing: after a power cut an old stamp might fit a torn file."""
        with suppress(OSError):
            self.stamp.unlink()
            sync_folder(self.folder)

    def identity(self) -> tuple[int, int] | None:
        """Device and inode of ``data.mdb``; None if it is missing."""
        try:
            of = self.data.stat()
        except FileNotFoundError:
            return None
        return of.st_dev, of.st_ino

    def state(self) -> bytes:
        """Size, time and inode of ``data.mdb`` as it is now, its content's digest unless it is large, and a digest."""
        state = self._outside()
        with self.data.open("rb") as file:
            if os.fstat(file.fileno()).st_size <= SMALL:
                content = xxhash.xxh3_128()
                while piece := file.read(_PIECE):
                    content.update(piece)
                state += content.hexdigest().encode() + b" "
        return state + xxhash.xxh3_64_hexdigest(state).encode() + b"\n"

    def _outside(self) -> bytes:
        of = self.data.stat()
        return f"{of.st_size} {of.st_mtime_ns} {of.st_ino} ".encode()
