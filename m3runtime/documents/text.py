"""`text_blocks`: UTF-8 bytes as text in bounded memory, as all plain-text kinds and JSON lines are read."""

import codecs
import io
from collections.abc import Iterable, Iterator
from pathlib import Path

from m3runtime.errors import InputError

BLOCK = 1 << 20
"""Bytes of a file that are read at a time."""
UNSPACED = (
    "\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff\u3040-\u312f\u31a0-\u31ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f"
    "\U00020000-\U0003ffff"
)
"""Characters of Chinese, Japanese, Thai and other scripts without spaces, for a regular expression: each is a word."""
_WIDE_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16, whose mark it begins with
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def file_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file, `BLOCK` at a time; an empty file gives none. Raises `InputError` if it cannot be read."""
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK):
                yield block
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def text_blocks(content: Iterable[bytes], name: str) -> Iterator[str]:
    """Decoded blocks of UTF-8, with or without a byte order mark; a line feed ends every line.

    Raises `InputError`, which calls the content ``name``, for another encoding and for binary content.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    lines = io.IncrementalNewlineDecoder(decoder, translate=True)
    count = 0
    for block in content:
        if not count:
            for mark, encoding in _WIDE_ENCODINGS.items():
                if block.startswith(mark):
                    raise InputError(f"{name} is text in {encoding}; convert it to UTF-8")
        if b"\0" in block:
            raise InputError(f"{name} is a binary file, not text")
        count += len(block)
        yield _decoded(lines, block, name, count)
    yield _decoded(lines, b"", name, count, final=True)


def _decoded(lines: io.IncrementalNewlineDecoder, block: bytes, name: str, count: int, *, final: bool = False) -> str:
    """The text of the bytes up to ``count``, but for a character or line end that the next block may complete."""
    try:
        return lines.decode(block, final)
    except UnicodeDecodeError as error:
        place = count - len(error.object) + error.start  # of the file: the decoder sees no more than it still needs
        raise InputError(f"{name} is a binary file, or text in another encoding than UTF-8 (byte {place})") from error
