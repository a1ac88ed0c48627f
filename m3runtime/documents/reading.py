"""Reading the documents that are to be remembered: `READERS` has the formats.

Plain text, JSON lines, tables and PDF are streamed: a block, a line, a row or a page is in memory at a time. HTML and
the other formats are parsed file by file, each as a whole.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

from m3runtime.config.schema import DocumentsConfig
from m3runtime.documents.charsets import declared_charset
from m3runtime.documents.document import Document
from m3runtime.documents.html import html_text
from m3runtime.documents.json_lines import json_documents
from m3runtime.documents.parts import Read
from m3runtime.documents.readers import code, csv, docx, epub, ipynb, pdf, pptx, xlsx
from m3runtime.documents.text import UNSPACED, file_blocks, text_blocks
from m3runtime.errors import InputError

FIELDS = DocumentsConfig()
"""The fields of JSON lines, as long as nothing else is configured."""


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
                raise InputError(f"{path} holds no text: no file that ends in .txt, .md, .pdf or another known suffix")
            for real, file in found.items():
                files.setdefault(real, Path(file))
        elif path.is_file():
            files.setdefault(os.path.realpath(path), path)
        else:
            raise InputError(f"{path} is neither a file nor a folder")
    return list(files.values()), skipped


def folder_files(folder: Path) -> tuple[dict[str, str], list[Path]]:
    """The files in a folder by their real paths, and the skipped ones; see `find_files`.

    The path of each begins with that of the folder. It is a text, since a folder may have very many.
    """
    files: dict[str, str] = {}
    skipped: list[Path] = []
    for file, real in _walk(str(folder), os.path.realpath(folder), set()):
        name = file.rpartition(os.sep)[2]
        if real is None or name.startswith(".") or name[name.rfind(".") :].lower() not in READERS:
            skipped.append(Path(file))
        else:
            files.setdefault(real, file)
    return files, skipped


def read_documents(paths: Iterable[str | Path], *, fields: DocumentsConfig = FIELDS) -> Iterator[Document]:
    """The documents in files and folders (`find_files`), blank ones left out, read as they are asked for.

    The source of each is the path as it was given. A file named ``.jsonl`` gives one document for each line, whose
    ``fields`` are the configuration's. Raises `InputError` at once for paths that cannot be used, and while it is
    iterated for a file that cannot be read, for a bad line of JSON, and at the end if there was no text at all. A long
    file raises it when its text is read.
    """
    return _read(find_files(paths)[0], fields)


def read_file(
    path: Path, source: str, *, fields: DocumentsConfig = FIELDS, unread: OnUnread | None = None
) -> Iterator[Document]:
    """The documents of one file that are not blank; see `read_documents`.

    With ``unread`` a record that cannot be read raises nothing: it is called with the reason, and the others follow.
    """
    for document in READERS.get(path.suffix.lower(), _read_plain)(path, fields):
        if isinstance(document, InputError):
            if unread is None:
                raise document
            unread(document)
        elif any(block.strip() for block in document.blocks()):
            yield replace(document, source=source)


def one_word(text: str) -> bool:
    """True if a text has fewer than two words: too little to be a reference."""
    return len(text.split()) < 2 and len(re.findall(f"[{UNSPACED}]", text)) < 2


def _read(files: Sequence[Path], fields: DocumentsConfig) -> Iterator[Document]:
    empty = True
    for path in files:
        for document in read_file(path, path.as_posix(), fields=fields):
            empty = False
            yield document
    if empty:
        raise InputError(f"there is no text in {', '.join(str(path) for path in files) or 'no files'}")


def _walk(folder: str, real: str, seen: set[str]) -> Iterator[tuple[str, str | None]]:
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
            yield entry.path, real_path if is_file else None
        elif not entry.name.startswith("."):
            yield from _walk(entry.path, real_path, seen)


def _read_plain(path: Path, _: DocumentsConfig) -> Iterator[Document]:
    begin = list(islice(file_blocks(path), 2))
    yield Document(path.as_posix(), path if len(begin) > 1 else "".join(text_blocks(begin, str(path))))


def _read_html(path: Path, _: DocumentsConfig) -> Iterator[Document]:
    content = list(file_blocks(path))
    declared = declared_charset(content[0]) if content else None
    yield Document(path.as_posix(), html_text("".join(text_blocks(content, str(path), declared))))


def _parted(read: Read) -> Callable[[Path, DocumentsConfig], Iterator[Document]]:
    """A reader of files that are one document each, and come in parts."""

    def documents(path: Path, _: DocumentsConfig) -> Iterator[Document]:
        yield Document(path.as_posix(), path, read=read)

    return documents


READERS: dict[str, Callable[[Path, DocumentsConfig], Iterator[Document | InputError]]] = {
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst"), _read_plain),
    **dict.fromkeys((".html", ".htm", ".xhtml"), _read_html),
    ".jsonl": json_documents,
    ".pdf": _parted(pdf.read),
    ".docx": _parted(docx.read),
    ".pptx": _parted(pptx.read),
    **dict.fromkeys((".xlsx", ".xlsm"), _parted(xlsx.read)),
    **dict.fromkeys((".csv", ".tsv"), _parted(csv.read)),
    ".epub": _parted(epub.read),
    ".ipynb": _parted(ipynb.read),
    **dict.fromkeys(code.LANGUAGES, _parted(code.read)),
}
"""The reader of each suffix. Other files are read as plain text when they are named themselves.

A reader raises `InputError` for a file that cannot be read, and gives one in place of a record that cannot be read.
"""
