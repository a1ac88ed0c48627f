"""Whether what was written to a file is on its drive, as the kernel's page cache tells."""

import ctypes
import os
import sys
from pathlib import Path

_CACHESTAT = 451  # on every architecture
_DIRTY, _WRITEBACK = 1, 2


def unsynced_pages(path: Path) -> int | None:
    """Pages of a file that are in memory only, or on their way to the drive. None where the kernel does not tell.

    By the system call cachestat(2), which Linux has from 6.5 on.
    """
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    whole, counts = (ctypes.c_uint64 * 2)(0, 0), (ctypes.c_uint64 * 5)()
    file = os.open(path, os.O_RDONLY)
    try:
        if libc.syscall(_CACHESTAT, file, whole, counts, 0):
            return None
    finally:
        os.close(file)
    return int(counts[_DIRTY]) + int(counts[_WRITEBACK])


def can_tell(folder: Path) -> bool:
    """Whether `unsynced_pages` sees, in this folder, a write that was not synced. In a RAM disk there is none."""
    path = folder / "unsynced"
    path.write_bytes(bytes(1 << 16))
    try:
        return bool(unsynced_pages(path))
    finally:
        path.unlink()


def unsynced_files(folder: Path) -> dict[str, int]:
    """The files below a folder with pages that are not on the drive, and how many. Lock files are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "lock" not in path.name and (pages := unsynced_pages(path)):
            found[str(path.relative_to(folder))] = pages
    return found
