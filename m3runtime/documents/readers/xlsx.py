"""Excel workbooks: the rows of each sheet."""

import datetime
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from m3runtime.documents.parts import Part
from m3runtime.documents.readers.opening import check_zip, library, readable
from m3runtime.documents.readers.rows import row_parts

_AT_ONCE = 256
"""Rows that are read at once."""


def read(path: Path) -> Iterator[Part]:
    """The sheets in order, each under its name as a heading, row by row. A formula has the value that was saved."""
    openpyxl = library(path, "openpyxl")
    check_zip(path, "Excel", "xl/workbook.xml")
    with readable(path, "Excel"):
        with warnings.catch_warnings(action="ignore"):  # of features that do not concern the cells
            book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        try:
            for sheet in book.worksheets:
                place = {"sheet": sheet.title}
                rows = row_parts(_rows(sheet), place)
                if (first := next(rows, None)) is not None:
                    yield Part(f"# {sheet.title}\n\n", place)
                    yield first
                    yield from rows
                    yield Part("\n", place)
        finally:
            book.close()


def _rows(sheet: Any) -> Iterator[Sequence[str]]:
    sheet.reset_dimensions()  # many programs write wrong ones
    rows = sheet.iter_rows(values_only=True)
    while True:
        with warnings.catch_warnings(action="ignore"):
            some = list(islice(rows, _AT_ONCE))
        if not some:
            return
        for row in some:
            yield [_shown(value) for value in row]


def _shown(value: object) -> str:
    match value:
        case None:
            return ""
        case float() if value.is_integer():
            return str(int(value))
        case datetime.datetime() if value.time() == datetime.time():
            return value.date().isoformat()
        case _:
            return str(value)
