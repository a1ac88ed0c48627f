"""The loops of the codec compiled for the CPU by numba. Imported when first used: that alone takes a second.

All let other threads run: a parallel kernel of numba's would not bear being called from two threads at once.
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
Kernel = Callable[..., None]
_BLOCK = 128
"""Tokens whose best centroids so far stay in the fastest cache."""


def _compiled(function: Kernel, signature: Any) -> Kernel:
    """Compiled now, and kept in a file where there may be one."""
    with contextlib.suppress(RuntimeError):  # no folder can be written to
        kept: Kernel = numba.njit(signature, nogil=True, cache=True)(function)
        return kept
    compiled: Kernel = numba.njit(signature, nogil=True)(function)
    return compiled


# -- decoding ---------------------------------------------------------------------------------------------------------


@cache
def gather_of(bytes: bool) -> Kernel:
    """The kernel that writes the centroids of codes that are ``uint8``, or else ``int64``."""
    whole, floats = numba.int64, numba.float32
    codes = numba.uint8 if bytes else numba.int64
    return _compiled(
        _gather,
        numba.void(codes[:, :, :], whole[:, ::1], whole[::1], floats[::1], floats[:, ::1], whole, whole, whole),
    )


def _gather(
    codes: Array,  # [n, width, codes of a token], any strides
    parts: Array,  # int64[parts, 3]: which of a token's codes, where it is written in a memory's floats, floats
    starts: Array,  # int64[parts]: where the centroids of each begin
    tables: Array,  # float32[all centroids]
    out: Array,  # float32[n, floats of a memory]
    step: int,  # floats from a token to the next
    begin: int,  # of the tokens n x width
    end: int,
) -> None:
    width = codes.shape[1]
    for i in range(begin // width, (end - 1) // width + 1):
        first, last = max(0, begin - i * width), min(width, end - i * width)
        # Part by part: the centroids of one stay in the cache for all tokens.
        for part in range(parts.shape[0]):
            code, to, size = parts[part, 0], parts[part, 1], parts[part, 2]
            start = starts[part]
            if size == 1:
                for token in range(first, last):
                    out[i, to + token * step] = tables[start + np.int64(codes[i, token, code])]
            elif size == 2:
                for token in range(first, last):
                    at, there = start + np.int64(codes[i, token, code]) * 2, to + token * step
                    out[i, there] = tables[at]
                    out[i, there + 1] = tables[at + 1]
            elif size == 4:
                for token in range(first, last):
                    at, there = start + np.int64(codes[i, token, code]) * 4, to + token * step
                    for k in range(4):
                        out[i, there + k] = tables[at + k]
            else:
                for token in range(first, last):
                    at, there = start + np.int64(codes[i, token, code]) * size, to + token * step
                    for k in range(size):
                        out[i, there + k] = tables[at + k]


# -- encoding ---------------------------------------------------------------------------------------------------------


def _fused(_: Any, a: Any, b: Any, c: Any) -> Any:
    return numba.float32(a, b, c), lambda context, builder, signature, arguments: builder.fma(*arguments)  # noqa: ARG005


_fma: Any = intrinsic(_fused)
"""``a * b + c``, rounded once."""


@cache
def nearest_of(size: int) -> Kernel:
    """The kernel that finds the nearest of centroids of ``size`` numbers.

    A part's centroids are scored and compared while they are in registers, some tokens to each, and no score is stored.
    Products are added up in the order and by the fused operation of a matrix product, so that codes are those that
    torch finds, bit by bit, wherever its matrix products are fused as well.
    """

    def nearest(
        x: Array,  # float32[rows, tokens, at least so many numbers], any strides
        places: Array,  # int64[parts, 3]: row, first number, table
        tables: Array,  # float32[tables, size + 1, centroids], as `nearest.scorer` makes; 4n centroids
        out: Array,  # int32[tokens, parts], any strides
        begin: int,  # of the parts
        end: int,
    ) -> None:
        centroids = tables.shape[2]
        cut = np.empty((size, _BLOCK), np.float32)
        best = np.empty(_BLOCK, np.float32)
        found = np.empty(_BLOCK, np.float32)
        # Whole numbers, that have as many bits as scores. Looked up, for the compiler would make wider ones of `c`.
        numbers = np.arange(centroids).astype(np.float32)
        blocks = (x.shape[1] + _BLOCK - 1) // _BLOCK
        for job in range(begin * blocks, end * blocks):
            part, start = job // blocks, job % blocks * _BLOCK
            row, first, table = places[part, 0], places[part, 1], tables[places[part, 2]]
            tokens = min(_BLOCK, x.shape[1] - start)
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
                out[start + t, part] = np.int32(found[t])

    whole = numba.int64
    x, tables = numba.float32[:, :, :], numba.float32[:, :, ::1]
    return _compiled(nearest, numba.void(x, whole[:, ::1], tables, numba.int32[:, :], whole, whole))
