"""Reading the texts that are to be remembered: text, markdown, reStructuredText, HTML and JSON lines."""

import codecs
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from m3runtime.errors import InputError

# Chinese, Japanese, Thai and others write without spaces: there a character counts as a word.
_WORDS = re.compile(
    r"[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"
)
_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_EMPTY_HEADINGS = re.compile(r"(?m)^#{1,6}[ ]*$")
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_BLOCKS = frozenset(
    (
        *_HEADINGS,
        *("address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "div", "dl", "dt"),
        *("fieldset", "figcaption", "figure", "footer", "form", "header", "hr", "li", "main", "nav", "ol"),
        *("option", "p", "pre", "section", "summary", "table", "tr", "ul"),
    )
)
_NO_TEXT = frozenset(("head", "noscript", "script", "style", "template"))
_WIDE_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


@dataclass(frozen=True, slots=True)
class Document:
    """A text and where it came from. Whatever the file had, a line feed ends its lines."""

    source: str
    """The path as it was given, with ``/``. A line of JSON adds ``:`` and its source, id or line number."""
    text: str


@dataclass(frozen=True, slots=True)
class FoundFiles:
    """What `find_files` came upon."""

    files: tuple[Path, ...]
    skipped: tuple[Path, ...]
    """Files in folders that were passed over: hidden, or of a suffix that is not read."""


def find_files(paths: Iterable[str | Path]) -> FoundFiles:
    """The files under ``paths``, each once, in the order given and folders in sorted order.

    Folders are walked to any depth, through symbolic links too, and each real folder once. A file that is
    named itself is taken whatever its suffix. Raises `InputError` for a path that is not there and for a
    folder in which there is nothing to read.
    """
    files: dict[Path, Path] = {}
    skipped: list[Path] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = False
            for file in _walk(path, set()):
                if file.name.startswith(".") or file.suffix.lower() not in READERS:
                    skipped.append(file)
                else:
                    files.setdefault(file.resolve(), file)
                    found = True
            if not found:
                raise InputError(f"{path} holds no text: no file that ends in {', '.join(READERS)}")
        elif path.is_file():
            files.setdefault(path.resolve(), path)
        else:
            raise InputError(f"{path} is neither a file nor a folder")
    return FoundFiles(tuple(files.values()), tuple(skipped))


def read_documents(paths: Iterable[str | Path], *, text_field: str = "text") -> Iterator[Document]:
    """The documents in files and folders (`find_files`), those without any text left out.

    A file named ``.jsonl`` gives one document for each line, whose text is in ``text_field``. Raises
    `InputError` at once for paths that cannot be used, and while it is iterated for a file that is not text
    in UTF-8, for a bad line of JSON, and at the end if there was no text at all.
    """
    return _read(find_files(paths).files, text_field)


def _read(files: tuple[Path, ...], text_field: str) -> Iterator[Document]:
    empty = True
    for path in files:
        for document in READERS.get(path.suffix.lower(), _read_plain)(path, text_field):
            if document.text.strip():
                empty = False
                yield document
    if empty:
        raise InputError(f"there is no text in {', '.join(str(path) for path in files) or 'no files'}")


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    real = folder.resolve()
    if real in seen:
        return
    seen.add(real)
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error.strerror}") from error
    for entry in entries:
        if entry.is_dir():
            if not entry.name.startswith("."):
                yield from _walk(entry, seen)
        else:
            yield entry


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _decoded(content: bytes, name: str) -> str:
    """UTF-8 with or without a byte order mark, line ends made one."""
    for mark, encoding in _WIDE_ENCODINGS.items():
        if content.startswith(mark):
            raise InputError(f"{name} is text in {encoding}; convert it to UTF-8")
    if b"\0" in content:
        raise InputError(f"{name} is a binary file, not text")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} is a binary file, or text in another encoding than UTF-8 (byte {error.start})"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_plain(path: Path, _: str) -> Iterator[Document]:
    yield Document(path.as_posix(), _decoded(_read_bytes(path), str(path)))


def _read_html(path: Path, _: str) -> Iterator[Document]:
    yield Document(path.as_posix(), html_text(_decoded(_read_bytes(path), str(path))))


def _read_json_lines(path: Path, text_field: str) -> Iterator[Document]:
    for number, line in enumerate(_read_bytes(path).split(b"\n"), 1):
        where = f"{path}, line {number}"
        text = _decoded(line, where)
        if not text.strip():
            continue
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
        yield Document(f"{path.as_posix()}:{name}", remembered.replace("\r\n", "\n").replace("\r", "\n"))


def one_word(text: str) -> bool:
    """Whether a text has fewer than two words: too little to be a reference."""
    return len(text.split()) < 2 and len(_WORDS.findall(text)) < 2


def html_text(markup: str) -> str:
    """The text of HTML: blocks parted by blank lines, headings as markdown's, no scripts and styles."""
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, XMLParsedAsHTMLWarning
    from bs4.element import CData, NavigableString, PageElement, Tag

    with warnings.catch_warnings():
        # It is HTML because its name says so, however it looks.
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        soup = BeautifulSoup(markup, "html.parser")
    parts = ["\n"]
    verbatim = 0  # how many <pre> are open
    # Each element on the way in, and a block once more on the way out. A recursion would end at deep markup.
    ahead: list[tuple[PageElement, bool]] = [(soup, False)]
    while ahead:
        element, left = ahead.pop()
        if isinstance(element, Tag):
            if element.name in _BLOCKS:
                parts.append("\n\n")
                verbatim += (element.name == "pre") * (-1 if left else 1)
            if left or element.name in _NO_TEXT:
                continue
            if element.name in _BLOCKS:
                ahead.append((element, True))
                if element.name in _HEADINGS:
                    parts.append(_HEADINGS[element.name])
            elif element.name == "br":
                parts.append("\n")
            elif element.name in ("td", "th") and not parts[-1][-1].isspace():
                parts.append(" ")
            ahead.extend((child, False) for child in reversed(element.contents))
        elif type(element) in (NavigableString, CData):  # not comments and declarations, which are subclasses
            text = str(element) if verbatim else re.sub(r"\s+", " ", str(element))
            if not verbatim and parts[-1][-1].isspace():
                text = text.lstrip(" ")
            if text:
                parts.append(text)
    lines = (line.rstrip() for line in "".join(parts).split("\n"))
    return _BLANK_LINES.sub("\n\n", _EMPTY_HEADINGS.sub("", "\n".join(lines))).strip()


READERS: dict[str, Callable[[Path, str], Iterator[Document]]] = {
    ".txt": _read_plain,
    ".md": _read_plain,
    ".rst": _read_plain,
    ".html": _read_html,
    ".htm": _read_html,
    ".jsonl": _read_json_lines,
}
"""How files of each suffix are read. Other files are read as plain text when they are named themselves."""
