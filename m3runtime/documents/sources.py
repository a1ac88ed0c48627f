"""Sources: the names that files have in a bank, and how a file was when it was written."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

from m3runtime.config.loading import DEFAULT_FILE
from m3runtime.documents.text import file_blocks

READING = 2
"""The version of reading and splitting. With a higher one all files are read anew when they are written again."""
_RECENT = 2_000_000_000
"""Nanoseconds. A file that changed this shortly ago may change again within the same tick of its clock."""


@dataclass(frozen=True, slots=True)
class SourceState:
    """A file as it was when all that it says was remembered, and nothing else of it."""

    size: int
    """Bytes."""
    time: int
    """Nanoseconds of its last change; 0 where they do not tell, because it changed just before it was read."""
    digest: str
    """BLAKE2b of its bytes, 32 hex digits."""
    how: str
    """How it was read and split: with other settings it gives other references."""
    expires: str = ""
    """The last day of all that it says; no text if it has none, or if only some of its records have one."""
    unread: tuple[str, ...] = ()
    """Why records of it cannot be read: the reasons without the path that each begins with."""
    tags: tuple[tuple[str, str], ...] = ()
    """Names and values that the metadata of all its places got when it was written, in order of names."""

    @property
    def has_settings(self) -> bool:
        """Has it a last day or tags, which its file does not tell?"""
        return bool(self.expires or self.tags)

    def voided(self) -> "SourceState":
        """A state that fits no file, so that the source is read anew, and has the same last day and tags."""
        return SourceState(0, 0, "", "", self.expires, (), self.tags)


class SourceNames:
    """The names of files in one bank: relative to the folder that holds the bank's folder, with ``/`` and ``..``.

    So a project that is moved with its bank keeps its names, and the working directory does not matter. A file that
    has nothing but the root in common with the bank is named by its absolute path. Symbolic links are not followed:
    a file that is given by two paths of different links has two names.
    """

    def __init__(self, bank: Path) -> None:
        folder = bank.absolute().parent
        self._bank = bank.name
        self._base = os.path.normpath(folder)
        self._bases = tuple(dict.fromkeys((self._base, os.path.realpath(folder))))

    def name(self, path: str | Path) -> str:
        """The name of a file or folder; ``.`` is the folder that holds the bank's."""
        given = os.path.abspath(path)  # noqa: PTH100 - links are not followed
        if given in self._bases:
            return "."
        for base in self._bases:
            if given.startswith(base + os.sep):
                return _posix(given[len(base) + 1 :])
        for base in self._bases:
            common = _common(given, base)
            if common and common != str(Path(common).parent):
                return _posix(os.path.relpath(given, base))
        return _posix(given)

    def is_own(self, name: str) -> bool:
        """Is this a file of the bank, or a configuration file by its usual name? A folder's walk passes over it."""
        return name.rpartition("/")[2] == DEFAULT_FILE or is_within(name, self._bank)

    def path(self, name: str) -> Path:
        """The file that a name stands for."""
        return Path(os.path.normpath(os.path.join(self._base, name)))  # noqa: PTH118 - `Path` keeps ``..``


def is_within(name: str, folder: str) -> bool:
    """Does a name stand for a file in a folder, at any depth, or for the folder itself?"""
    if folder == ".":
        return not (name.startswith("../") or Path(name).is_absolute())
    return name == folder or name.startswith(folder.rstrip("/") + "/")


def last_change(status: os.stat_result) -> int:
    """Nanoseconds of the last change of a file's bytes, or of its name or rights."""
    return max(status.st_mtime_ns, status.st_ctime_ns)


def is_as_stated(path: str | Path, state: SourceState) -> bool:
    """Has a file the size and time that its state has? False if it is gone."""
    try:
        status = os.stat(path)  # noqa: PTH116 - very many files are compared, and their paths are texts
    except OSError:
        return False
    return status.st_size == state.size and last_change(status) == state.time


def state_of(path: Path, how: str) -> SourceState:
    """How a file is now. Raises `InputError` if it cannot be read."""
    digest = blake2b(digest_size=16)
    size, changed = 0, 0
    with suppress(OSError):  # reading it says why
        changed = last_change(path.stat())
    for block in file_blocks(path):
        digest.update(block)
        size += len(block)
    return SourceState(size, changed if time.time_ns() - changed > _RECENT else 0, digest.hexdigest(), how)


def _common(path: str, other: str) -> str:
    try:
        return os.path.commonpath((path, other))
    except ValueError:  # another drive
        return ""


def _posix(path: str) -> str:
    return path.replace(os.sep, "/") if os.sep != "/" else path
