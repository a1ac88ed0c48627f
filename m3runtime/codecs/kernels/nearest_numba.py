"""`m3runtime.codecs.kernels.nearest` compiled for the CPU by numba. Imported when first used: that takes a second.

A part's centroids are scored and compared while they are in registers, some tokens to each, and no score is stored.
Products are added up in the order and by the fused operation of a matrix product, so that codes are those that numpy
finds, bit by bit, wherever its matrix products are fused as well.
"""

import contextlib
from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from numba.extending import intrinsic

Array = npt.NDArray[Any]
BLOCK = 128
"""Tokens whose best centroids so far stay in the fastest cache."""


def _fused(_: Any, a: Any, b: Any, c: Any) -> Any:
    return numba.float32(a, b, c), lambda context, builder, signature, arguments: builder.fma(*arguments)  # noqa: ARG005


_fma: Any = intrinsic(_fused)
"""``a * b + c``, rounded once."""


@cache
def kernel(size: int, *, bytes: bool) -> Callable[..., None]:
    """What finds the nearest of centroids of ``size`` numbers, and writes codes of ``uint8``, or else ``int32``.

    Compiled the first time, and kept in a file where there may be one. It lets other threads run.
    """

    def nearest(
        x: Array,  # float32[rows, tokens, at least so many numbers], any strides
        places: Array,  # int64[parts, 3]: row, first number, table
        tables: Array,  # float32[tables, size + 1, centroids], as `nearest.scorer` makes; 4n centroids
        out: Array,  # uint8 or int32[tokens, n, m] of n * m parts, any strides
        begin: int,  # of the parts
        end: int,
    ) -> None:
        centroids = tables.shape[2]
        cut = np.empty((size, BLOCK), np.float32)
        best = np.empty(BLOCK, np.float32)
        found = np.empty(BLOCK, np.float32)
        # Whole numbers, that have as many bits as scores. Looked up, for the compiler would make wider ones of `c`.
        numbers = np.arange(centroids).astype(np.float32)
        blocks = (x.shape[1] + BLOCK - 1) // BLOCK
        for job in range(begin * blocks, end * blocks):
            part, start = job // blocks, job % blocks * BLOCK
            row, first, table = places[part, 0], places[part, 1], tables[places[part, 2]]
            tokens = min(BLOCK, x.shape[1] - start)
            for t in range(tokens):
                for k in range(size):
                    cut[k, t] = x[row, start + t, first + k]
            best[:] = -np.inf
            found[:] = 0
            for c in range(0, centroids, 4):  # four at a time, or reading and writing the best would take longest
                a_at, b_at, d_at, e_at = numbers[c], numbers[c + 1], numbers[c + 2], numbers[c + 3]
                for t in range(tokens):
                    a = cut[0, t] * table[0, c]
                    b = cut[0, t] * table[0, c + 1]
                    d = cut[0, t] * table[0, c + 2]
                    e = cut[0, t] * table[0, c + 3]
                    for k in range(1, size):
                        a = _fma(cut[k, t], table[k, c], a)
                        b = _fma(cut[k, t], table[k, c + 1], b)
                        d = _fma(cut[k, t], table[k, c + 2], d)
                        e = _fma(cut[k, t], table[k, c + 3], e)
                    a += table[size, c]
                    b += table[size, c + 1]
                    d += table[size, c + 2]
                    e += table[size, c + 3]
                    # Of equal ones the first.
                    low, low_at = (b, b_at) if b > a else (a, a_at)
                    high, high_at = (e, e_at) if e > d else (d, d_at)
                    most, most_at = (high, high_at) if high > low else (low, low_at)
                    before = best[t]
                    found[t] = most_at if most > before else found[t]
                    best[t] = most if most > before else before
            for t in range(tokens):
                out[start + t, part // out.shape[2], part % out.shape[2]] = np.int32(found[t])

    whole = numba.int64
    signature = numba.void(
        numba.float32[:, :, :],
        whole[:, ::1],
        numba.float32[:, :, ::1],
        (numba.uint8 if bytes else numba.int32)[:, :, :],
        whole,
        whole,
    )
    with contextlib.suppress(RuntimeError):  # no folder can be written to
        return numba.njit(signature, nogil=True, cache=True)(nearest)
    return numba.njit(signature, nogil=True)(nearest)
