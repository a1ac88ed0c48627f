"""Reading the documents that are to be remembered: text, markdown, reStructuredText, HTML and JSON lines.

Plain text and JSON lines are streamed: a block of a text file, or one line of JSON, is in memory at a time. HTML is
parsed file by file, each as a whole.
"""

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from m3runtime.documents.embedded import OnLeftOut, without_embedded
from m3runtime.documents.html import html_text
from m3runtime.documents.reference import Place
from m3runtime.documents.text import UNSPACED, file_blocks, text_blocks
from m3runtime.errors import InputError


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it came from. A line feed ends its lines, and base64 is left out, whatever the file had."""

    source: str
    """The name of the file."""
    content: str | Path
    """The text, or the plain-text file that holds it, which is read each time that the text is asked for."""
    metadata: Mapping[str, str] = field(default_factory=dict, hash=False)
    """See `Place.metadata`. A line of JSON has its source, id or line number as ``record``."""

    @property
    def name(self) -> str:
        """The source, and behind a colon its record, if it has any."""
        return Place(self.source, 0, 0, self.metadata).name

    @property
    def text(self) -> str:
        """The whole text, in memory."""
        return "".join(self.blocks())

    def blocks(self, left_out: OnLeftOut | None = None) -> Iterator[str]:
        """The text in pieces of about a million characters, cut anywhere; without pictures and files in base64.

        ``left_out`` is called with the place and length of each that was left out. Raises `InputError` if a file is not
        text in UTF-8.
        """
        return without_embedded(self._blocks(), left_out)

    def _blocks(self) -> Iterator[str]:
        if isinstance(self.content, str):
            yield self.content
            return
        rest = ""
        for block in text_blocks(file_blocks(self.content), str(self.content)):
            end = block.rfind("\n") + 1
            yield rest + block[:end]
            rest = block[end:]
        yield rest


OnUnread = Callable[[InputError], None]
"""Called with the reason why a record cannot be read."""


def find_files(paths: Iterable[str | Path]) -> tuple[list[Path], list[Path]]:
    """The files under ``paths``, each once, in the order given and folders in sorted order; and the skipped files.

    A file in a folder is skipped if it is hidden or has a suffix that is not read. So is what is no file: a pipe, a
    socket, a device, or a link that leads nowhere. Folders are walked to any depth, through symbolic links too, and
    each real folder once. A file that is named itself is taken whatever its suffix. Raises `InputError` for a path that
    does not exist and for a folder in which there is nothing to read.
    """
    files: dict[str, Path] = {}
    skipped: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found, others = folder_files(path)
            skipped += others
            if not found:
                raise InputError(f"{path} holds no text: no file that ends in {', '.join(READERS)}")
            for real, file in found.items():
                files.setdefault(real, file)
        elif path.is_file():
            files.setdefault(os.path.realpath(path), path)
        else:
            raise InputError(f"{path} is neither a file nor a folder")
    return list(files.values()), skipped


def folder_files(folder: Path) -> tuple[dict[str, Path], list[Path]]:
    """The files in a folder by their real paths, and the skipped ones; see `find_files`."""
    files: dict[str, Path] = {}
    skipped: list[Path] = []
    for file, real in _walk(str(folder), os.path.realpath(folder), set()):
        if real is None or file.name.startswith(".") or file.suffix.lower() not in READERS:
            skipped.append(file)
        else:
            files.setdefault(real, file)
    return files, skipped


def read_documents(paths: Iterable[str | Path], *, text_field: str = "text") -> Iterator[Document]:
    """The documents in files and folders (`find_files`), blank ones left out, read as they are asked for.

    The source of each is the path as it was given. A file named ``.jsonl`` gives one document for each line, whose text
    is in ``text_field``. Raises `InputError` at once for paths that cannot be used, and while it is iterated for a file
    that is not text in UTF-8, for a bad line of JSON, and at the end if there was no text at all. A long file raises it
    when its text is read.
    """
    return _read(find_files(paths)[0], text_field)


def read_file(
    path: Path, source: str, *, text_field: str = "text", unread: OnUnread | None = None
) -> Iterator[Document]:
    """The documents of one file that are not blank; see `read_documents`.

    With ``unread`` a record that cannot be read raises nothing: it is called with the reason, and the others follow.
    """
    for document in READERS.get(path.suffix.lower(), _read_plain)(path, text_field):
        if isinstance(document, InputError):
            if unread is None:
                raise document
            unread(document)
        elif any(block.strip() for block in document.blocks()):
            yield replace(document, source=source)


def one_word(text: str) -> bool:
    """True if a text has fewer than two words: too little to be a reference."""
    return len(text.split()) < 2 and len(re.findall(f"[{UNSPACED}]", text)) < 2


def _read(files: Sequence[Path], text_field: str) -> Iterator[Document]:
    empty = True
    for path in files:
        for document in read_file(path, path.as_posix(), text_field=text_field):
            empty = False
            yield document
    if empty:
        raise InputError(f"there is no text in {', '.join(str(path) for path in files) or 'no files'}")


def _walk(folder: str, real: str, seen: set[str]) -> Iterator[tuple[Path, str | None]]:
    """What is in a folder, each file with its real path, and without one what is neither file nor folder."""
    if real in seen:
        return
    seen.add(real)
    try:
        with os.scandir(folder) as entries:
            found = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in found:
        real_path = os.path.realpath(entry.path) if entry.is_symlink() else f"{real}{os.sep}{entry.name}"
        is_file = is_folder = False
        with suppress(OSError):  # a link that leads to itself
            is_file, is_folder = entry.is_file(), entry.is_dir()
        if not is_folder:
            yield Path(entry.path), real_path if is_file else None
        elif not entry.name.startswith("."):
            yield from _walk(entry.path, real_path, seen)


def _read_plain(path: Path, _: str) -> Iterator[Document]:
    begin = list(islice(file_blocks(path), 2))
    yield Document(path.as_posix(), path if len(begin) > 1 else "".join(text_blocks(begin, str(path))))


def _read_html(path: Path, _: str) -> Iterator[Document]:
    yield Document(path.as_posix(), html_text("".join(text_blocks(file_blocks(path), str(path)))))


def _read_json_lines(path: Path, text_field: str) -> Iterator[Document | InputError]:
    for number, line in enumerate(_lines(path), 1):
        try:
            if document := _record(path, number, line, text_field):
                yield document
        except InputError as error:
            yield error


def _record(path: Path, number: int, line: bytes, text_field: str) -> Document | None:
    """The document of a line; None for a blank one."""
    where = f"{path}, line {number}"
    text = "".join(text_blocks([line], where))
    if not text.strip():
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    if not isinstance(record, dict) or not isinstance(record.get(text_field), str):
        raise InputError(f"{where} is not an object with a text in {text_field!r}")
    remembered: str = record[text_field]
    try:
        remembered.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {text_field!r} has half a character (a lone surrogate)") from error
    name = record.get("source", record.get("id", number))
    lines = remembered.replace("\r\n", "\n").replace("\r", "\n")
    return Document(path.as_posix(), lines, {"record": str(name)})


def _lines(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as file:
            yield from file
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


READERS: dict[str, Callable[[Path, str], Iterator[Document | InputError]]] = {
    ".txt": _read_plain,
    ".md": _read_plain,
    ".rst": _read_plain,
    ".html": _read_html,
    ".htm": _read_html,
    ".jsonl": _read_json_lines,
}
"""The reader of each suffix. Other files are read as plain text when they are named themselves.

A reader raises `InputError` for a file that cannot be read, and gives one in place of a record that cannot be read.
"""
