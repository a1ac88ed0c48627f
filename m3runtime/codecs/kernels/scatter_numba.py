"""Coordinates that codes stand for, compiled for the CPU by numba. Imported when first used: that takes a second."""

import contextlib
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def _scatter(
    codes: Array,  # uint8[n, width, codes of a token], any strides
    parts: Array,  # int32[parts, 3]: which of a token's codes, first coordinate, coordinates
    starts: Array,  # int64[parts]: where the centroids of each begin
    tables: Array,  # float32[all centroids]
    out: Array,  # float32[n * rows, at least the coordinates]
    begin: int,  # of the tokens n x width
    end: int,
) -> None:
    n, width = codes.shape[0], codes.shape[1]
    rows = out.shape[0] // n
    for i in range(begin // width, (end - 1) // width + 1):
        first, last = max(0, begin - i * width), min(width, end - i * width)
        row = i * rows
        # Part by part: the centroids of one stay in the cache for all tokens.
        for part in range(parts.shape[0]):
            code, to, size = parts[part, 0], parts[part, 1], parts[part, 2]
            start = starts[part]
            if size == 1:
                for token in range(first, last):
                    out[row + token, to] = tables[start + np.int64(codes[i, token, code])]
            elif size == 2:
                for token in range(first, last):
                    at = start + np.int64(codes[i, token, code]) * 2
                    out[row + token, to] = tables[at]
                    out[row + token, to + 1] = tables[at + 1]
            elif size == 4:
                for token in range(first, last):
                    at = start + np.int64(codes[i, token, code]) * 4
                    for k in range(4):
                        out[row + token, to + k] = tables[at + k]
            else:
                for token in range(first, last):
                    at = start + np.int64(codes[i, token, code]) * size
                    for k in range(size):
                        out[row + token, to + k] = tables[at + k]


def _compiled() -> Callable[..., None]:
    floats, whole = numba.float32, numba.int64
    signature = numba.void(
        numba.uint8[:, :, :], numba.int32[:, ::1], whole[::1], floats[::1], floats[:, ::1], whole, whole
    )
    with contextlib.suppress(RuntimeError):  # no folder can be written to
        return numba.njit(signature, nogil=True, cache=True)(_scatter)
    return numba.njit(signature, nogil=True)(_scatter)


scatter = _compiled()
