"""Books in EPUB: the chapters in their order, read as HTML."""

import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from posixpath import normpath
from urllib.parse import unquote
from xml.etree import ElementTree
from zipfile import ZipFile

from m3runtime.documents.charsets import declared_charset
from m3runtime.documents.html import html_text
from m3runtime.documents.parts import Part
from m3runtime.documents.readers.opening import check_zip, readable
from m3runtime.documents.text import text_blocks
from m3runtime.errors import InputError

_CONTAINER = "META-INF/container.xml"
_ENCRYPTION = "META-INF/encryption.xml"
_HEAD = re.compile(r"(?is)<head\b.*?</head>")
"""Its title is often that of the book."""
_TITLE = re.compile(r"#{1,6} (.+)")


def read(path: Path) -> Iterator[Part]:
    """The files of the spine, one in memory at a time. ``chapter`` is the heading that begins one, or began the last.

    Raises `InputError` also for a book that is protected against being read.
    """
    check_zip(path, "EPUB", _CONTAINER)
    with readable(path, "EPUB"), ZipFile(path) as book:
        chapter = ""
        names = _spine(book)
        if locked := _locked(book).intersection(names):
            raise InputError(f"{path} is protected (DRM): {min(locked)} is encrypted")
        for name in names:
            content = book.read(name)
            markup = "".join(text_blocks([content], f"{path}, {name}", declared_charset(content)))
            text = html_text(_HEAD.sub("", markup))
            if title := _TITLE.match(text):
                chapter = title[1].strip()
            if text:
                yield Part(f"{text}\n\n", {"chapter": chapter} if chapter else {})


def _spine(book: ZipFile) -> list[str]:
    """The names of the chapters' files in reading order."""
    root = ElementTree.fromstring(book.read(_CONTAINER)).find(".//{*}rootfile")
    if root is None:
        raise ValueError(f"{_CONTAINER} names no book")
    package = root.attrib["full-path"]
    tree = ElementTree.fromstring(book.read(package))
    folder = PurePosixPath(package).parent
    items = {
        item.attrib["id"]: normpath(str(folder / unquote(item.attrib["href"])))
        for item in tree.iterfind(".//{*}manifest/{*}item")
    }
    return [items[one.attrib["idref"]] for one in tree.iterfind(".//{*}spine/{*}itemref")]


def _locked(book: ZipFile) -> set[str]:
    """The names of files that are encrypted; fonts often are."""
    if _ENCRYPTION not in book.namelist():
        return set()
    tree = ElementTree.fromstring(book.read(_ENCRYPTION))
    return {unquote(one.attrib["URI"]) for one in tree.iterfind(".//{*}CipherReference")}
