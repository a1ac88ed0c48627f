"""`Claim`: the right to open a home. One process writes and any number read, after the file was found whole.

A process takes ``opening.lock`` before it opens a home, unless it reads and the stamp fits the file. While it holds the
lock, either ``writer.lock`` is taken, and that writer has verified the file, or no writer can come in between.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from m3backends.lmdb.files import HomeFiles
from m3backends.lmdb.structure import check_structure
from m3runtime.errors import BankBusyError, BankError

if TYPE_CHECKING:
    from filelock import BaseFileLock
if os.name == "posix":
    import fcntl


T = TypeVar("T")


class Claim:
    """The locks of a process that has a home open. The kernel frees them if the process dies.

    Raises `BankBusyError` if another process writes and this one wants to, and `BankError` for a damaged file.
    """

    def __init__(self, files: HomeFiles, *, read_only: bool) -> None:
        self._files = files
        self._writer: BaseFileLock | None = None
        self._reader: int | None = None
        self.verified: bytes | None = None
        """The state of the file whose pages were verified just now; its records are still to be checked."""
        files.check()
        self.registers = files.can_register()
        """Does LMDB register this process as a reader?"""
        try:
            if not read_only:
                self._take_writing()
            elif self.registers:
                self._trust_reading()
            else:
                self._read_alone()
        except OSError as error:
            self.release()
            raise BankError(f"bank {files.folder} cannot be opened: {error}") from error
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let others write. Releasing twice is fine."""
        if self._writer is not None:
            self._writer.release()
            self._writer = None
        if self._reader is not None:
            os.close(self._reader)
            self._reader = None

    def at_rest(self, work: Callable[[], T]) -> T | None:
        """Run ``work`` for a reader while no process can write; None if a process may."""
        if not self.registers:
            return work()
        with _lock(self._files.opening):
            if (writer := take(self._files.writer)) is None:
                return None
            try:
                return work()
            finally:
                writer.release()

    def _take_writing(self) -> None:
        with _lock(self._files.opening):
            self._writer = take(self._files.writer)
            if self._writer is None:
                raise self._busy()
            self._verify()

    def _trust_reading(self) -> None:
        if not self._files.is_verified():
            self.at_rest(self._verify)

    def _read_alone(self) -> None:
        """Read without being registered, and keep writers out, which might reuse the pages that are being read."""
        if os.name == "posix" and self._files.writer.exists():
            self._reader = os.open(self._files.writer, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(self._reader, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                raise BankBusyError(
                    f"bank {self._files.folder} is being written, and can be read meanwhile only by who may write "
                    f"{self._files.table.name}"
                ) from None
        self._verify()

    def _verify(self) -> None:
        if self._files.is_empty() or self._files.is_verified():
            return
        state = self._files.state()
        check_structure(self._files.data)
        self.verified = state

    def _busy(self) -> BankBusyError:
        return BankBusyError(
            f"bank {self._files.folder} is open for writing already, here or in another process; "
            "close it there, or open it for reading only"
        )


def take(path: Path) -> "BaseFileLock | None":
    """A lock that was free and is held now; None if another has it."""
    from filelock import Timeout

    lock = _lock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def _lock(path: Path) -> "BaseFileLock":
    """A lock that any thread may release, and that follows no symbolic link."""
    from filelock import FileLock  # readers of a home that fits its stamp take none

    return FileLock(path, thread_local=False, fallback_to_soft=False)
