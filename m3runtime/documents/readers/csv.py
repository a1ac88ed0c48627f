"""Tables as text: CSV and TSV."""

import csv
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from m3runtime.documents.parts import Part
from m3runtime.documents.readers.opening import readable
from m3runtime.documents.readers.rows import row_parts
from m3runtime.documents.text import file_blocks, text_blocks, text_lines

_LONGEST = 1 << 24
"""Characters of a cell."""


def read(path: Path) -> Iterator[Part]:
    """The rows, one in memory at a time; comma, semicolon, tab or bar parts the cells."""
    lines = text_lines(text_blocks(file_blocks(path), str(path)))
    first = next(lines, "")
    with readable(path, "CSV"):
        csv.field_size_limit(max(csv.field_size_limit(), _LONGEST))  # of the process; the default is 128 KiB
        yield from row_parts(csv.reader(chain([first], lines), delimiter=_delimiter(path, first)), {})


def _delimiter(path: Path, first: str) -> str:
    return "\t" if path.suffix.lower() == ".tsv" else max(",;\t|", key=first.count)
