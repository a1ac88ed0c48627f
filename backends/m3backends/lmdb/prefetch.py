"""`Prefetch`: asks the drive for the pages of a few records at once, before LMDB reads them.

LMDB maps its file. A page that is not in memory is read when it is touched: one after the other, and each with the
pages around it, which is right for a scan and wasted on a few blocks. So the way to the blocks is found first, in the
same snapshot, level by level: the pages of one level are asked for together, and then those of the blocks. LMDB finds
all of them in memory. Bytes are never taken from here: a wrong page would cost time and nothing else.
"""

import os
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import lmdb

MOST = 64
"""More records than these are a scan, which the kernel's own readahead serves better."""
DENSE = 16
"""As many records, with keys that are close together, are part of a scan, too."""

# LMDB 0.9, 64 bits, in the machine's byte order; `check_structure` reads the same format.
_DATABASE = struct.Struct("=4x 2x H 8x 8x 8x 8x Q")
"""A database's record: depth, page of the root."""
_PAGE = struct.Struct("=8x 2x H H 2x")
"""Flags, end of the offsets of nodes."""
_NODE = struct.Struct("=I H H")
"""Lower half of the child's page, or size of the value; upper half, or flags; size of the key."""
_OFFSET = struct.Struct("=H").unpack_from
_NUMBER = struct.Struct("=Q").unpack_from
_BRANCH, _IN_OVERFLOW = 1, 1


class Prefetch:
    """The data file of one open environment. Thread-safe. Does nothing where the system cannot be asked."""

    def __init__(self, data: Path, page_bytes: int) -> None:
        """Raises `OSError`."""
        self._page_bytes = page_bytes
        self._file: int | None = None
        if hasattr(os, "posix_fadvise"):
            self._file = os.open(data, os.O_RDONLY)
            os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def close(self) -> None:
        """Close the file, while no other thread uses it. Closing twice is fine."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def fetch(self, txn: "lmdb.Transaction[memoryview]", database: bytes, keys: Sequence[bytes]) -> None:
        """Ask for the pages of these records of a database that has ids as keys; in a scan for none."""
        if self._file is None or not keys or _is_scan(keys) or (record := txn.get(database)) is None:
            return
        with suppress(struct.error, OverflowError, OSError):  # damage: LMDB meets it next, and says so
            depth, root = _DATABASE.unpack(record)
            pages = {root: list(keys)}
            for _ in range(min(depth, 32)):
                pages = self._descend(self._file, pages)

    def _descend(self, file: int, pages: dict[int, list[bytes]]) -> dict[int, list[bytes]]:
        """The children of pages of one level that lead to each key. Values outside of a leaf are asked for."""
        size, below = self._page_bytes, dict[int, list[bytes]]()
        if len(pages) > 1:
            self._ask(file, ((number, size) for number in pages))
        values = list[tuple[int, int]]()
        for number, keys in pages.items():
            page = os.pread(file, size, number * size)
            for key in keys:
                place = _search(page, key)
                low, high, length = _NODE.unpack_from(page, place)
                if _PAGE.unpack_from(page)[0] & _BRANCH:
                    below.setdefault(low | high << 32, []).append(key)
                elif high & _IN_OVERFLOW and page[place + 8 : place + 8 + length] == key:
                    values.append((_NUMBER(page, place + 8 + length)[0], _PAGE.size + low))
        self._ask(file, values)
        return below

    def _ask(self, file: int, extents: Iterable[tuple[int, int]]) -> None:
        """Have the kernel read extents, each a first page and bytes; it goes on while we do."""
        for number, length in extents:
            os.posix_fadvise(file, number * self._page_bytes, length, os.POSIX_FADV_WILLNEED)


def _is_scan(keys: Sequence[bytes]) -> bool:
    if len(keys) < DENSE:
        return False
    return len(keys) > MOST or int.from_bytes(max(keys)) - int.from_bytes(min(keys)) < 2 * len(keys)


def _search(page: bytes, key: bytes) -> int:
    """Where the node with the last key up to this one lies, or the first node."""
    low, high = 0, (_PAGE.unpack_from(page)[1] - _PAGE.size) // 2
    while high - low > 1:
        middle = (low + high) // 2
        place = _OFFSET(page, _PAGE.size + 2 * middle)[0]
        if page[place + 8 : place + 8 + _OFFSET(page, place + 6)[0]] <= key:
            low = middle
        else:
            high = middle
    return _OFFSET(page, _PAGE.size + 2 * low)[0]  # type: ignore[no-any-return]
