"""The bytes that usearch writes, checked before usearch reads them: it trusts counts, offsets and slots.

::

    rows, cols           2 x uint32: the matrix of vectors, one row for each slot
    vectors              rows x cols bytes
    head                 64 bytes: "usearch", version, kinds of metric, scalar, key and slot, counts, dimensions
    graph                5 x uint64: slots, connectivity, connectivity of level 0, highest level, slot to start from
    levels               int16 of each slot
    nodes                of each slot: key (uint64), level (int16), and for each level from 0 up a list of neighbours:
                         count (uint32) and as many slots (uint32) as the level's connectivity

The same in every release 2.x. A file that is laid out otherwise is refused, and the index rebuilt.
"""

import numpy as np
import numpy.typing as npt

FREE = np.uint64(2**64 - 1)
"""The key of a slot whose vector was removed."""

_MATRIX, _HEAD, _GRAPH, _NODE = 8, 64, 40, 10
_KINDS = slice(13, 17)  # of metric, scalar, key and slot, in the head
_PIECE = 1 << 16
_FLOATS: dict[str, tuple[npt.DTypeLike, int]] = {  # as what they are read, and the bits of an infinite exponent
    "f32": (np.uint32, 0x7F800000),
    "f16": (np.uint16, 0x7C00),
    "bf16": (np.uint16, 0x7F80),
}


def problem(body: memoryview, empty: bytes, *, count: int, dim: int, dtype: str) -> str | None:
    """Why usearch cannot be given these bytes; None if it can.

    ``empty`` is what this usearch writes for an index of the same options that holds nothing. First comes what says
    how long the bytes must be, so that little is read of a file that lies about it.
    """
    try:
        _check(body, empty, count, dim, dtype)
    except _WrongError as error:  # not let out: its frames would keep ``body`` from being released
        return str(error)
    return None


class _WrongError(Exception):
    pass


def _check(body: memoryview, empty: bytes, count: int, dim: int, dtype: str) -> None:
    rows, cols = _numbers(body, 0, "<u4", 2)
    itemsize = 4 if dtype == "f32" else 1 if dtype == "i8" else 2
    if rows and cols != dim * itemsize:
        raise _WrongError(f"its vectors have {cols} bytes, not {dim * itemsize}")
    at = _MATRIX + rows * cols
    head = _part(body, at, _HEAD).tobytes()
    model = empty[_MATRIX:]
    present, deleted, dims = (int(x) for x in np.frombuffer(head, "<u8", 3, 17))
    if head[:7] != model[:7] or head[_KINDS] != model[_KINDS] or head[41:] != model[41:_HEAD] or dims != dim:
        raise _WrongError("it is of another kind, metric or dtype, or its head is damaged")
    size, connectivity, base, highest, start = _numbers(body, at + _HEAD, "<u8", 5)
    if rows != size or present + deleted != size or present != count:
        raise _WrongError(f"it states {count} vectors, and {present} of {size}")
    if not 2 <= connectivity <= 1 << 16 or base != 2 * connectivity:
        raise _WrongError(f"its connectivity is {connectivity} and {base}")
    at += _HEAD + _GRAPH
    levels = _part(body, at, 2 * size).view("<i2").astype(np.int64)
    at += 2 * size
    if size and (levels.min() < 0 or start >= size or not levels.max() == highest == levels[start]):
        raise _WrongError("its levels are damaged")
    below, above = 4 * (1 + base), 4 * (1 + connectivity)
    ends = at + np.cumsum(_NODE + below + levels * above)
    if (int(ends[-1]) if size else at) != len(body):
        raise _WrongError(f"it has {len(body)} bytes, and its nodes end elsewhere")
    starts = np.concatenate([[at], ends[:-1]])[:size]
    nodes = np.frombuffer(body, np.uint8)
    _check_keys(nodes, starts, levels, deleted)
    for level in range(int(highest) + 1 if size else 0):
        having = np.flatnonzero(levels >= level)
        first = starts[having] + _NODE + (below + (level - 1) * above if level else 0)
        _check_neighbours(nodes, first, base if level == 0 else connectivity, levels, level)
    _check_vectors(_part(body, _MATRIX, rows * cols), dtype)


def _check_keys(
    nodes: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], levels: npt.NDArray[np.int64], deleted: int
) -> None:
    keys, own = np.empty(len(starts), "<u8"), np.empty(len(starts), "<i2")
    for begin in range(0, len(starts), _PIECE):
        some = slice(begin, begin + _PIECE)
        heads = _records(nodes, starts[some], _NODE)
        keys[some], own[some] = heads[:, :8].copy().view("<u8")[:, 0], heads[:, 8:].copy().view("<i2")[:, 0]
    kept = keys[keys != FREE]
    if (own != levels).any() or len(keys) - len(kept) != deleted or len(np.unique(kept)) != len(kept):
        raise _WrongError("its keys are damaged")


def _check_neighbours(
    nodes: npt.NDArray[np.uint8], first: npt.NDArray[np.int64], most: int, levels: npt.NDArray[np.int64], level: int
) -> None:
    """The lists of one level, which begin at ``first``: no longer than they may be, and of slots on that level."""
    for begin in range(0, len(first), _PIECE):
        lists = _records(nodes, first[begin : begin + _PIECE], 4 * (1 + most)).view("<u4")
        counts, slots = lists[:, 0], lists[:, 1:]
        if (counts > most).any():
            raise _WrongError("a list of neighbours is longer than it may be")
        used = slots[np.arange(most) < counts[:, None]]
        if (used >= len(levels)).any() or (levels[used] < level).any():
            raise _WrongError("a list of neighbours leads nowhere")


def _check_vectors(vectors: npt.NDArray[np.uint8], dtype: str) -> None:
    if dtype in _FLOATS:
        kind, infinite = _FLOATS[dtype]
        numbers = vectors.view(kind)
        for begin in range(0, len(numbers), _PIECE * 64):
            if ((numbers[begin : begin + _PIECE * 64] & infinite) == infinite).any():
                raise _WrongError("a vector is not finite")


def _records(nodes: npt.NDArray[np.uint8], starts: npt.NDArray[np.int64], size: int) -> npt.NDArray[np.uint8]:
    """Copies of ``size`` bytes from each start, ``uint8[n, size]``."""
    return np.lib.stride_tricks.sliding_window_view(nodes, size)[starts]


def _numbers(body: memoryview, at: int, kind: str, count: int) -> list[int]:
    return [int(x) for x in _part(body, at, count * np.dtype(kind).itemsize).view(kind)]


def _part(body: memoryview, at: int, size: int) -> npt.NDArray[np.uint8]:
    """``size`` bytes from ``at`` on. Raises `_WrongError` if there are not as many."""
    if at + size > len(body):
        raise _WrongError("it is cut off, or its head is damaged")
    return np.frombuffer(body, np.uint8, size, at) if size else np.zeros(0, np.uint8)
