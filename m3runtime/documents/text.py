"""`text_blocks`: bytes as text in bounded memory, as all plain-text kinds and JSON lines are read."""

import codecs
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from m3runtime.documents.charsets import charset, marked_charset
from m3runtime.errors import InputError

BLOCK = 1 << 20
"""Bytes of a file that are read at a time."""
UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u312f\u31a0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
"""Characters of Chinese, Japanese, Thai and other scripts without spaces, for a regular expression: each is a word."""


def file_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, `BLOCK` at a time; an empty file gives none. Raises `InputError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def text_blocks(content: Iterable[bytes], name: str, declared: str | None = None) -> Iterator[str]:
    """The bytes of a text, decoded block by block; a line feed ends every line.

    The encoding is the one of a byte order mark, or UTF-8, or the ``declared`` one, or the likeliest of those that are
    common. Raises `InputError`, which calls the content ``name``, for binary content and damaged text.
    """
    stateful = declared if declared and declared.startswith("iso2022") else None  # in ASCII's own bytes
    encoding: str | None = None
    decoder, lines = codecs.getincrementaldecoder("ascii")(), io.IncrementalNewlineDecoder(None, translate=True)
    count = 0
    for block in content:
        if encoding is None:
            encoding = (marked_charset(block) if not count else None) or stateful
            if b"\0" in block and not (encoding or "").startswith(("utf-16", "utf-32")):
                raise InputError(f"{name} is a binary file, not text")
            if encoding is None and not block.isascii():
                encoding = charset(block, name, declared)
            if encoding is not None:
                decoder = codecs.getincrementaldecoder(encoding)()
        count += len(block)
        text = _decoded(decoder, block, name, count)
        if "\0" in text:
            raise InputError(f"{name} is a binary file, not text")
        yield lines.decode(text)
    yield lines.decode(_decoded(decoder, b"", name, count, final=True), final=True)


def text_lines(blocks: Iterable[str]) -> Iterator[str]:
    """The lines of a text that comes in blocks, each with the line feed that ends it; the last may have none."""
    rest: list[str] = []
    for block in blocks:
        *whole, tail = block.split("\n")
        for line in whole:
            yield "".join((*rest, line, "\n"))
            rest = []
        rest.append(tail)
    if last := "".join(rest):
        yield last


def _decoded(decoder: codecs.IncrementalDecoder, block: bytes, name: str, count: int, *, final: bool = False) -> str:
    """The text of the bytes up to ``count``, but for a character that the next block may complete."""
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        place = count - len(error.object) + error.start  # of the file: the decoder sees no more than it still needs
        raise InputError(
            f"{name} is a binary file, or damaged text: byte {place} is not {error.encoding.upper()}"
        ) from error
