"""Files that are read without trust in what lies in their place, and written whole or not at all."""

import errno
import os
import secrets
import stat
from collections.abc import Callable
from contextlib import suppress
from glob import escape
from pathlib import Path
from typing import BinaryIO

_RANDOM = 8
"""Random bytes in the name of a temporary file."""


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading. A link is followed, and nothing is read or waited for.

    Raises `OSError`, also for a pipe, which would be waited for, and for a device, which may have no end.
    """
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "Not a regular file", str(path))
        return open(handle, "rb")  # noqa: PTH123 - a handle, not a path
    except BaseException:
        os.close(handle)
        raise


def write_atomically(path: Path, content: bytes | Callable[[Path], None], *, mode: int | None = None) -> None:
    """Write all of a file, or leave what was at ``path`` as it was; a link is replaced, not followed.

    ``content`` is the bytes, or a function that fills the temporary file whose path it is given; the file exists
    already and is empty. It lies in the same folder under a name that nobody can foresee, so that no link waits there.
    After the return the new content survives a power cut. ``mode`` sets the file's permissions; without it, they are a
    new file's. Raises `OSError`, and what ``content`` raises. Threads and processes may write the same path; the last
    one wins.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(_RANDOM)}.tmp")
    try:
        with temporary.open("xb") as file:
            if isinstance(content, bytes):
                file.write(content)
        if not isinstance(content, bytes):
            content(temporary)
        with temporary.open("r+b") as file:  # Windows syncs a file only through a handle that may write
            os.fsync(file.fileno())
        if mode is not None:
            temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def remove_remains(path: Path) -> None:
    """Remove the temporary files of calls of `write_atomically` for this path that were killed.

    No other process may be writing ``path``. Raises `OSError`.
    """
    for remains in path.parent.glob(f".{escape(path.name)}.{'?' * 2 * _RANDOM}.tmp"):
        remains.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make what was created, renamed or removed in a folder survive a power cut. Raises `OSError`.

    Does nothing on Windows, where a folder cannot be opened and its changes are in the file system's journal.
    """
    if not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
