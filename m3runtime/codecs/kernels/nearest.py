"""The nearest centroid of each part of each vector, the work of `ProductCodec.encode`."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from m3runtime.codecs.kernels.lookup import compiled, share_out

_AT_ONCE = 16 * 256
"""Centroids scored by one call on a CPU: their scores for 128 tokens are 2 MiB and stay in the cache."""

_LARGEST = 8
"""Numbers of a centroid up to which scoring and comparing in one go is faster than a matrix product."""


def scorer(centroids: Tensor) -> Tensor:
    """What `nearest` multiplies with: ``float32[groups, parts, size + 1, n]`` of ``[groups, parts, n, size]``.

    The nearest centroid of x has the greatest x·c - |c|²/2. The second term is one more row, against ones.
    """
    row = centroids.square().sum(3, keepdim=True) / -2
    return torch.cat([centroids, row], 3).transpose(2, 3).contiguous()


def nearest(x: Tensor, against: Tensor, sharing: int, out: Tensor) -> None:
    """Write which centroids are nearest to contiguous vectors ``float32[heads, tokens, dim]`` to ``out``.

    ``out`` is ``uint8`` or ``int32[tokens, heads, parts]`` on the CPU, of any strides; ``against`` is the `scorer` of
    ``heads / sharing`` groups, on the device of ``x``. Deterministic: among equally near centroids the first. Uses
    ``torch.get_num_threads()`` threads on a CPU. There numba finds them, if it is installed (``m3runtime[fast]``), and
    else numpy, three times as slowly and bit by bit the same.
    """
    parts, size = against.shape[1], against.shape[2] - 1
    if x.device.type == "cpu":
        if size <= _LARGEST and against.shape[3] % 4 == 0 and compiled():
            head, part = torch.arange(len(x)).repeat_interleave(parts), torch.arange(parts).repeat(len(x))
            places = torch.stack([head, part * size, head // sharing * parts + part], 1)
            nearest_at(x, places, against.flatten(0, 1), out)
        else:
            by_numpy(x.numpy(), against.numpy(), sharing, out.numpy())
        return
    cut = torch.unflatten(x, 2, (parts, size)).transpose(1, 2)
    cut = torch.nn.functional.pad(cut, (0, 1), value=1.0)
    groups = against.repeat_interleave(sharing, 0)
    codes = torch.stack([torch.bmm(a, b).argmax(2) for a, b in zip(cut, groups, strict=True)])
    out.copy_(codes.permute(2, 0, 1))


def nearest_at(x: Tensor, places: Tensor, against: Tensor, out: Tensor) -> None:
    """`nearest` by numba, of parts that lie anywhere in ``float32[rows, tokens, any]`` of any strides on the CPU.

    ``places`` is ``int64[parts, 3]``: of each part its row, its first number, and which of ``against``, ``float32[any,
    size + 1, centroids]``, are its centroids. ``out`` is ``uint8`` or ``int32[tokens, n, m]`` of any strides, of as
    many codes as there are parts. Raises `ImportError` without numba.
    """
    from m3runtime.codecs.kernels.nearest_numba import kernel

    of = (x.numpy(), places.numpy(), against.numpy(), out.numpy())
    work = kernel(against.shape[1] - 1, bytes=out.dtype == torch.uint8)
    share_out(lambda first, end: work(*of, first, end), len(places), len(places) * x.shape[1] * against.shape[2])


def by_numpy(
    x: npt.NDArray[np.float32], against: npt.NDArray[np.float32], sharing: int, out: npt.NDArray[np.integer]
) -> None:
    """`nearest` by numpy, whose argmax over a row of floats is several times as fast as torch's.

    The heads are divided among threads, which numpy lets run at the same time. Each product has the same operands
    however they are divided.
    """
    heads, tokens, _ = x.shape
    _, parts, rows, centroids = against.shape
    size, at_once = rows - 1, min(max(1, _AT_ONCE // centroids), parts)

    def work(some: range) -> None:
        cut = np.ones((at_once, tokens, rows), np.float32)
        scores = np.empty((at_once, tokens, centroids), np.float32)
        best = np.empty((at_once, tokens), np.int64)
        for head in some:
            vectors = x[head].reshape(tokens, parts, size).swapaxes(0, 1)
            for start in range(0, parts, at_once):
                now = slice(start, min(start + at_once, parts))
                n = now.stop - start
                cut[:n, :, :size] = vectors[now]
                np.matmul(cut[:n], against[head // sharing, now], out=scores[:n])
                np.argmax(scores[:n], 2, out=best[:n])
                out[:, head, now] = best[:n].T

    workers = min(torch.get_num_threads(), heads)
    if workers == 1:
        work(range(heads))
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, [range(i, heads, workers) for i in range(workers)]))
