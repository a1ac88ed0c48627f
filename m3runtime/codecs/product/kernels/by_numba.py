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
    """Compile a kernel now, and keep it in a file if a folder can be written to."""
    with contextlib.suppress(RuntimeError):  # no folder can be written to
        kept: Kernel = numba.njit(signature, nogil=True, cache=True)(function)
        return kept
    compiled: Kernel = numba.njit(signature, nogil=True)(function)
    return compiled


# -- decoding ---------------------------------------------------------------------------------------------------------


_UNITS = (np.dtype(np.complex128), np.dtype(np.complex64), np.dtype(np.float32))


def unit_of(size: int) -> "np.dtype[Any]":
    """The largest type of number that centroids of ``size`` floats consist of: 16 bytes are one load and one store."""
    return next(unit for unit in _UNITS if size * 4 % unit.itemsize == 0)


@cache
def look_up_of(unit: "np.dtype[Any]") -> Kernel:
    """The kernel that adds up the centroids of levels whose tables are read in such units."""
    whole, yes, kind = numba.int64, numba.boolean, numba.from_dtype(unit)
    codes, floats = numba.uint8[:, :, :, :], numba.float32[:, :, :, ::1]
    add = numba.types.Array(numba.float32, 3, "C", readonly=False)
    tables, out = kind[:, ::1], kind[:, :, :, ::1]
    return _compiled(_look_up, numba.void(codes, whole, whole, tables, out, floats, yes, add, whole, whole))


def _look_up(
    codes: Array,  # uint8[n, width, heads, bytes of the level], any strides
    parts: int,
    bits: int,
    tables: Array,  # unit[groups, parts * 2**bits * units of a centroid]
    out: Array,  # unit[n, heads, width, units of a vector]
    floats: Array,  # float32[n, heads, width, dim]: the same memory
    accumulate: bool,  # add to what is written already; else write over it
    add: Array,  # float32[n, heads, dim] to be added, or none
    first: int,  # of the jobs heads x n
    end: int,
) -> None:
    n, width, heads, size = codes.shape
    dim = floats.shape[3]
    units = out.shape[3] // parts
    sharing = heads // tables.shape[0]
    centroids = 1 << bits
    scratch = np.empty(out.shape[3], out.dtype)
    summand = scratch.view(np.float32)
    for job in range(first, end):
        head = job // n
        i = job % n
        table = tables[head // sharing]
        if bits == 8 and units == 1 and not accumulate:  # the most frequent case, which compiles to the fastest loop
            for token in range(width):
                for part in range(parts):
                    out[i, head, token, part] = table[part * 256 + np.int64(codes[i, token, head, part])]
        elif bits == 8 and not accumulate:
            for token in range(width):
                for part in range(parts):
                    start = (part * 256 + np.int64(codes[i, token, head, part])) * units
                    for u in range(units):
                        out[i, head, token, part * units + u] = table[start + u]
        else:
            for token in range(width):
                for part in range(parts):
                    bit = part * bits
                    byte = bit >> 3
                    number = np.int64(codes[i, token, head, byte])
                    if byte + 1 < size:
                        number |= np.int64(codes[i, token, head, byte + 1]) << 8
                    if byte + 2 < size:
                        number |= np.int64(codes[i, token, head, byte + 2]) << 16
                    start = (part * centroids + ((number >> (bit & 7)) & (centroids - 1))) * units
                    for u in range(units):
                        scratch[part * units + u] = table[start + u]
                if accumulate:
                    for channel in range(dim):
                        floats[i, head, token, channel] += summand[channel]
                else:
                    for channel in range(dim):
                        floats[i, head, token, channel] = summand[channel]
        if len(add):
            for token in range(width):
                for channel in range(dim):
                    floats[i, head, token, channel] += add[i, head, channel]


@cache
def scatter() -> Kernel:
    """The kernel that writes the coordinates of a unit of the transform."""
    floats, whole = numba.float32, numba.int64
    codes, parts = numba.uint8[:, :, :], numba.int32[:, ::1]
    return _compiled(_scatter, numba.void(codes, parts, whole[::1], floats[::1], floats[:, ::1], whole, whole))


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
