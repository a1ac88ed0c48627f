"""A check of LMDB's pages by plain Python. LMDB trusts them: a flipped bit in one can crash or hang the process."""

import os
import struct
import sys
from pathlib import Path

from lmdb.verify import VerifyError, verify

from m3runtime.errors import BankError

_META = struct.Struct("=16x I I 8x Q I 92x Q Q")
"""A meta page of LMDB 0.9: magic, version, map size, page size, last page, transaction."""
_MAGIC = 0xBEEFC0DE
_UNWRITTEN = 64 << 20
"""Bytes of pages that a file may lack at its end: a killed LMDB leaves free ones unwritten."""


def check_structure(data: Path) -> None:
    """Raise `BankError` unless every page is as LMDB needs it. No process may write meanwhile.

    Takes about 7 microseconds a record, and 2 bytes of memory for each page. LMDB itself reads nothing, so no file can
    harm the process.
    """
    problems = structure_problems(data)
    if problems:
        raise BankError(f"bank {data} is damaged: {problems[0]}; restore it from a copy, or write it anew")


def structure_problems(data: Path) -> list[str]:
    """The defects of the pages of a file that no process writes; none if LMDB can be trusted with it."""
    try:
        return _too_large(data) or verify(str(data), subdir=False)
    except (VerifyError, OSError) as error:
        return [str(error)]
    except RecursionError:
        return ["databases within databases"]


def set_last_transaction(data: Path, number: int) -> None:
    """Give the last transaction of a file that no process has open this number; it had a smaller one, or this.

    Raises `BankError` if the file is not LMDB's.
    """
    with data.open("r+b") as file:
        pages = [file.read(_META.size)]
        file.seek(_META.unpack(pages[0])[3])
        pages.append(file.read(_META.size))
        numbers = [_META.unpack(page)[5] for page in pages]
        if any(_META.unpack(page)[0] != _MAGIC for page in pages) or (number - max(numbers)) % 2:
            raise BankError(f"bank {data}: no transaction of it can have the number {number}")
        for place, page in enumerate(pages):
            file.seek(place * _META.unpack(page)[3] + _META.size - 8)
            file.write((numbers[place] + number - max(numbers)).to_bytes(8, sys.byteorder))
        file.flush()
        os.fsync(file.fileno())


def _too_large(data: Path) -> list[str]:
    """A complaint if the file states more pages than it can have: memory and time depend on that number."""
    with data.open("rb") as file:
        status = os.fstat(file.fileno())
        size = status.st_size
        # Holes cost nothing to claim. A real file has few, even where the file system compresses it.
        allocated = 16 * 512 * status.st_blocks + (4 << 30) if hasattr(status, "st_blocks") else size
        page_bytes = 0
        for number in (0, 1):
            file.seek(number * page_bytes)
            page = file.read(_META.size)
            if len(page) < _META.size:
                return []  # for the verifier to describe
            magic, _, _, stated, last, _ = _META.unpack(page)
            if magic != _MAGIC or not stated:
                return []
            page_bytes = page_bytes or stated
            needed = (last + 1) * page_bytes
            if needed > size + _UNWRITTEN or needed > allocated + _UNWRITTEN:
                return [f"it states {last + 1} pages of {page_bytes} bytes, and has {size} bytes"]
    return []
