"""`Uploads`: the folder of uploaded documents, and which names and files it takes."""

import os
import re
import shutil
import time
import unicodedata
import uuid
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from m3runtime.config.schema import Config
from m3runtime.documents.reading import READERS
from m3runtime.documents.sources import SourceNames
from m3runtime.serve.changes import Add, is_upload
from m3runtime.serve.errors import ApiError

_LONGEST = 200
"""Bytes of a name in UTF-8: file systems take 255."""
_KEPT = 86_400
"""Seconds until a file that waits counts as left behind."""
_REFUSED = re.compile(r'[/\\:*?"<>|\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]')
"""Characters that make a path of a name, that some file system does not take, or that turn how a name reads."""


class Uploads:
    """A folder whose files the bank mirrors, so that `m3 sync` keeps what was uploaded. Thread-safe.

    A file waits in a hidden folder until it was found readable, and only then takes its name. Another upload under
    the same name replaces it.
    """

    def __init__(self, config: Config) -> None:
        self.folder = config.serve.uploads or config.bank.absolute().parent / "uploads"
        self._waiting = self.folder / ".waiting"
        self._names = SourceNames(config.bank)

    def take(self, name: str, content: BinaryIO | bytes) -> Add:
        """Store a file until it is its turn. Raises `ApiError` for a name that cannot be one, and if it is empty."""
        name = checked_name(name)
        self._waiting.mkdir(parents=True, exist_ok=True)
        waiting = self._waiting / f"{uuid.uuid4().hex}{Path(name).suffix}"
        try:
            with waiting.open("xb") as file:
                if isinstance(content, bytes):
                    file.write(content)
                else:
                    shutil.copyfileobj(content, file)
                file.flush()
                os.fsync(file.fileno())
            if not waiting.stat().st_size:
                raise ApiError(400, f"{name} is empty", param="file")
        except BaseException:
            waiting.unlink(missing_ok=True)
            raise
        return Add(waiting, self.folder / name)

    def has(self, source: str) -> bool:
        """Was a source uploaded?"""
        return is_upload(source, self.folder, self._names)

    def clear(self) -> None:
        """Remove what waited when an earlier server ended; another one of the same bank may run."""
        oldest = time.time() - _KEPT
        for path in self._waiting.glob("*"):
            with suppress(OSError):
                if path.stat().st_mtime < oldest:
                    path.unlink()


def checked_name(name: str) -> str:
    """The name of a document, in Unicode's composed form. Raises `ApiError`: 400 for a path, 415 for another type."""
    name = unicodedata.normalize("NFC", name.strip())
    try:
        size = len(name.encode())
    except UnicodeEncodeError:  # half a character
        size = 0
    if not size or size > _LONGEST or name.startswith(".") or _REFUSED.search(name):
        raise ApiError(
            400,
            f"a document's name is the name of a file, without folders, of at most {_LONGEST} bytes",
            param="name",
            code="invalid_name",
        )
    suffix = Path(name).suffix.lower()
    if suffix not in READERS:
        known = ", ".join(sorted(READERS)[:60])
        raise ApiError(415, f"{suffix or 'a name without suffix'} is not read; these are: {known}", param="name")
    return name
