"""Plain text."""

from collections.abc import Iterator
from pathlib import Path

from m3runtime.documents.parts import Part
from m3runtime.documents.text import file_blocks, text_blocks


def read(path: Path) -> Iterator[Part]:
    """The text in pieces of about a million characters, cut between lines where it has any."""
    rest = ""
    for block in text_blocks(file_blocks(path), str(path)):
        end = block.rfind("\n") + 1
        yield Part(rest + block[:end])
        rest = block[end:]
    yield Part(rest)
