"""`m3runtime.codecs.kernels.lookup` compiled for the CPU by numba. Imported when first used: that alone takes a second.

Each stage's table is read in units of 4, 8 or 16 bytes, a centroid of 16 bytes by one load and one store.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
_UNITS = (np.complex128, np.complex64, np.float32)


def unit(size: int) -> type[np.generic]:
    """The largest type of number that centroids of ``size`` floats consist of."""
    return next(kind for kind in _UNITS if size * 4 % np.dtype(kind).itemsize == 0)


def _look_up(
    codes: Array,  # uint8[n, width, heads, bytes of the stage], any strides
    parts: int,
    bits: int,
    tables: Array,  # unit[groups, parts * 2**bits * units of a centroid]
    out: Array,  # unit[n, heads, width, units of a vector]
    floats: Array,  # float32[n, heads, width, dim]: the same memory
    accumulate: bool,  # add to what is there; else write over it
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


def _compiled() -> Callable[..., None]:
    def signature(kind: Any) -> Any:
        whole, yes = numba.int64, numba.boolean
        codes, floats = numba.uint8[:, :, :, :], numba.float32[:, :, :, ::1]
        add = numba.types.Array(numba.float32, 3, "C", readonly=False)
        return numba.void(codes, whole, whole, kind[:, ::1], kind[:, :, :, ::1], floats, yes, add, whole, whole)

    signatures = [signature(kind) for kind in (numba.complex128, numba.complex64, numba.float32)]
    # It lets other threads run. A parallel kernel of numba's would not bear being called from two at once.
    with contextlib.suppress(RuntimeError):  # no folder can be written to
        return numba.njit(signatures, nogil=True, cache=True)(_look_up)
    return numba.njit(signatures, nogil=True)(_look_up)


look_up = _compiled()
