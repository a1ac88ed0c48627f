"""`BlockFiles`: reads blocks of a table in a folder from its files, as fast as plain files are read.

Lance reads a blob in several steps, in other threads and with more copies. Its files of rows and of blobs never
change, so the range of a block in its file is right as long as that file exists, and is kept in memory. Each read asks
the table for the rows' addresses, and thereby whether the rows still exist.

The files are those of Lance's format 2.2: a blob lies in the data file of its row, or in a file of blobs next to it.
"""

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from m3backends.lance.snapshot import Snapshot
from m3runtime.memory.block import Rows

_MOST = 8_000_000
"""Most rows of a table whose ranges are kept, 21 bytes for each. Those of a larger table are read each time."""
_INLINE, _PACKED, _DEDICATED = 0, 1, 2
_FRAGMENT = 1 << 32
"""A row's address is the number of its fragment times this, and its place in it."""

Ranges = npt.NDArray[np.void]
Range = tuple[int, int, int, int]
"""Kind, position, size, and the number of the file of blobs."""
_RANGE = np.dtype([("kind", "u1"), ("position", "u8"), ("size", "u8"), ("blob_id", "u4")])


class BlockFiles:
    """The files of a table in a folder. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._data = folder / "data"
        self._fragments: dict[int, tuple[Path, Ranges]] = {}
        self._lock = threading.Lock()

    def read(self, snapshot: Snapshot, rows: Sequence[int], out: Rows, into: Sequence[int]) -> bool:
        """Copy the blocks of rows of the table into rows of ``out``, with zeros behind each.

        Returns False if the files are not as they should be: the library then reads them, and says what is wrong.
        Raises `ValueError` if a row is gone.
        """
        small = snapshot.row_count <= _MOST
        columns = ["_rowaddr"] if small else ["_rowaddr", "block"]
        found = snapshot.dataset._take_rows(list(rows), columns=columns)
        addresses = found["_rowaddr"].to_pylist()
        if len(addresses) < len(rows):  # the order is the one asked for
            raise ValueError("a row is gone")
        try:
            if small:
                places = [self._place(snapshot, address) for address in addresses]
            else:
                files = [self._file(snapshot, address // _FRAGMENT) for address in addresses]
                places = list(zip(files, _ranges(found["block"]).tolist(), strict=True))
            return _read(places, out, into)
        except FileNotFoundError:
            return False

    def _place(self, snapshot: Snapshot, address: int) -> tuple[Path, Range]:
        """The data file of a row, and the range of its block."""
        number, at = divmod(address, _FRAGMENT)
        if (known := self._fragments.get(number)) is None:
            fragment = snapshot.dataset.get_fragment(number)
            blocks = fragment.scanner(columns=["block"], with_row_address=True).to_table()
            ranges = np.zeros(fragment.physical_rows, _RANGE)
            ranges[blocks["_rowaddr"].to_numpy() % _FRAGMENT] = _ranges(blocks["block"])
            known = self._file(snapshot, number), ranges
            with self._lock:
                there = {one.fragment_id for one in snapshot.dataset.get_fragments()}
                self._fragments = {one: kept for one, kept in self._fragments.items() if one in there}
                self._fragments[number] = known
        return known[0], known[1][at].item()

    def _file(self, snapshot: Snapshot, number: int) -> Path:
        """The data file of a fragment that has the column of blocks."""
        files = snapshot.dataset.get_fragment(number).metadata.files
        path: str = next(file.path for file in files if snapshot.block_field in file.fields)
        return self._data / path


def _ranges(column: Any) -> Ranges:
    """The ranges in a column of blobs; of none for a null."""
    ranges = np.zeros(len(column), _RANGE)
    blobs = column.combine_chunks()
    for name in ("kind", "position", "size", "blob_id"):
        ranges[name] = blobs.field(name).fill_null(0).to_numpy(zero_copy_only=False)
    return ranges


def _read(places: Sequence[tuple[Path, Range]], out: Rows, into: Sequence[int]) -> bool:
    """Read the ranges. The drive is asked for all of them before the first is waited for. Raises `OSError`."""
    with ExitStack() as stack:
        opened = _opener(stack)
        asked = list[tuple[int, int, int]]()
        for data, (kind, start, size, blob) in places:
            if kind not in (_INLINE, _PACKED, _DEDICATED):
                return False
            file = opened(data if kind == _INLINE else data.with_suffix("") / _blob_file(blob))
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, start, size, os.POSIX_FADV_WILLNEED)
            asked.append((file, start, min(size, out.shape[1])))
        for row, (file, start, size) in zip(into, asked, strict=True):
            if os.preadv(file, [out[row, :size].data], start) != size:
                return False
            out[row, size:] = 0  # or bytes of a former read would stand there
    return True


def _opener(stack: ExitStack) -> Callable[[Path], int]:
    """A function that opens each file once. The stack closes them."""
    files: dict[Path, int] = {}

    def opened(path: Path) -> int:
        if path not in files:
            files[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, files[path])
        return files[path]

    return opened


def _blob_file(number: int) -> str:
    """The name of a file of blobs: its number in binary, the lowest digit first."""
    return f"{number:032b}"[::-1] + ".blob"
