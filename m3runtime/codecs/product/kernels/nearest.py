"""The nearest centroid of each part of each vector: the work of encoding."""

import torch
from torch import Tensor

from m3runtime.codecs.product.kernels.sharing import compiled, share_out

_AT_ONCE = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Scores that are held at once: on a CPU those of 16 codebooks for 128 vectors, which stay in the cache."""
_ROWS = 256
"""Vectors that share one product at least, however many centroids there are."""
_LARGEST = 8
"""Numbers of a centroid up to which scoring and comparing in one go is faster than a matrix product."""


def scorer(centroids: Tensor) -> Tensor:
    """The matrices that `nearest` multiplies by: ``[tables, size + 1, n]`` for ``[tables, n, size]``.

    The nearest centroid of x has the greatest x·c - |c|²/2. The second term is one more row, against ones.
    """
    row = centroids.square().sum(2, keepdim=True) / -2
    return torch.cat([centroids, row], 2).transpose(1, 2).contiguous()


def nearest(x: Tensor, places: Tensor, against: Tensor, out: Tensor) -> None:
    """Write the number of the nearest centroid of each part to ``out``, ``int32[tokens, parts]`` of any strides.

    The parts lie anywhere in ``x``, ``[rows, tokens, any]`` of any strides. ``places`` is ``int64[parts, 3]``: the row
    of each part, its first number, and which table of ``against``, ``[tables, size + 1, centroids]`` by `scorer`, holds
    its centroids. All lie on one device. ``x`` and ``against`` are float32, or float64 for choices that do not depend
    on the device. Of equally near centroids the first is chosen. Deterministic.

    Small parts of float32 on a CPU are compared by numba, if it is installed (``m3runtime[fast]``), on
    ``torch.get_num_threads()`` threads; torch finds the same, bit by bit, in five times as long.
    """
    small = against.shape[1] - 1 <= _LARGEST and against.shape[2] % 4 == 0
    if small and x.dtype == torch.float32 and x.device.type == "cpu" and compiled():
        by_numba(x, places, against, out)
    else:
        by_torch(x, places, against, out)


def by_torch(x: Tensor, places: Tensor, against: Tensor, out: Tensor) -> None:
    """`nearest` on any device."""
    _, columns, centroids = against.shape
    most = _AT_ONCE.get(x.device.type, _AT_ONCE["cuda"])
    tokens = max(_ROWS, most // centroids)
    parts = max(1, most // (min(tokens, x.shape[1]) * centroids + 1))
    within = torch.arange(columns - 1, device=x.device)
    for some, codes in zip(torch.split(places, parts), torch.split(out, parts, 1), strict=True):
        row, first, table = some.unbind(1)
        tables = against[table]
        for rows, found in zip(torch.split(x, tokens, 1), torch.split(codes, tokens), strict=True):
            cut = rows[row[:, None], :, first[:, None] + within].transpose(1, 2)  # [parts, tokens, size]
            scores = torch.bmm(torch.nn.functional.pad(cut, (0, 1), value=1.0), tables)
            found.copy_(_greatest(scores).T)


def _greatest(scores: Tensor) -> Tensor:
    if scores.device.type == "cpu":  # numpy's argmax is several times as fast as torch's
        return torch.from_numpy(scores.numpy().argmax(2))
    return scores.argmax(2)


def by_numba(x: Tensor, places: Tensor, against: Tensor, out: Tensor) -> None:
    """`nearest` for parts of float32 on a CPU. Raises `ImportError` without numba."""
    from m3runtime.codecs.product.kernels.by_numba import nearest_of

    work = nearest_of(against.shape[1] - 1)
    of = (x.numpy(), places.numpy(), against.numpy(), out.numpy())
    share_out(lambda first, end: work(*of, first, end), len(places), len(places) * x.shape[1] * against.shape[2])
