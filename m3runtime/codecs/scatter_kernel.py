"""Coordinates that codes stand for, compiled for the CPU by numba. Imported when first used: that takes a second."""

import contextlib
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def _scatter(
    codes: Array,  # uint8[tokens, parts], any strides
    parts: Array,  # int32[parts, 3]: unit, first coordinate, coordinates
    starts: Array,  # int64[parts]: where the centroids of each begin
    tables: Array,  # float32[all centroids]
    out: Array,  # float32[units, at least tokens, kept]
    begin: int,  # of the parts
    end: int,
) -> None:
    # Part by part: the centroids of one stay in the cache for all tokens.
    for part in range(begin, end):
        unit, first, width = parts[part, 0], parts[part, 1], parts[part, 2]
        start = starts[part]
        for token in range(codes.shape[0]):
            at = start + np.int64(codes[token, part]) * width
            for i in range(width):
                out[unit, token, first + i] = tables[at + i]


def _compiled() -> Callable[..., None]:
    floats, whole = numba.float32, numba.int64
    signature = numba.void(
        numba.uint8[:, :], numba.int32[:, ::1], whole[::1], floats[::1], floats[:, :, ::1], whole, whole
    )
    with contextlib.suppress(RuntimeError):  # no folder can be written to
        return numba.njit(signature, nogil=True, cache=True)(_scatter)
    return numba.njit(signature, nogil=True)(_scatter)


scatter = _compiled()
