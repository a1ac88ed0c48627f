"""Opening files with libraries: a missing library and a broken file give one line that names the file."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from m3runtime.errors import InputError, PluginError
from m3runtime.plugins.loading import import_for
from m3runtime.plugins.messages import one_line

_MOST_UNPACKED = 1 << 30
"""Bytes of a zip file's members, so that a small hostile file cannot fill the memory."""


def library(path: Path, module: str) -> Any:
    """The module that reads a file. Raises `InputError`, with what to install, if it is not installed."""
    try:
        return import_for(str(path), module)
    except PluginError as error:
        raise InputError(str(error)) from error


_OLE = b"\xd0\xcf\x11\xe0"
"""The beginning of files that Office encrypted, and of those before 2007."""


@contextmanager
def readable(path: Path, kind: str) -> Iterator[None]:
    """Turn every error of a library into an `InputError` that names the file: a broken one may raise anything."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or one_line(error)}") from error
    except Exception as error:
        raise InputError(f"{path} is damaged or no {kind} file: {one_line(error)}") from error


def check_zip(path: Path, kind: str, member: str) -> None:
    """Raise `InputError` unless the file is a zip with this member, of a bounded size when it is unpacked."""
    with readable(path, kind):
        with path.open("rb") as begin:
            if begin.read(4) == _OLE:
                raise InputError(
                    f"{path} is encrypted or of an old version of Office; save it anew, without a password"
                )
        with zipfile.ZipFile(path) as file:
            if member not in file.namelist():
                raise InputError(f"{path} is no {kind} file: it has no {member}")
            if sum(one.file_size for one in file.infolist()) > _MOST_UNPACKED:
                raise InputError(f"{path} is larger than {_MOST_UNPACKED >> 30} GiB when it is unpacked; split it")
