"""The centroids that the codes of levels stand for: the work of decoding them."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from m3runtime.codecs.product.kernels.sharing import compiled, share_out
from m3runtime.codecs.product.residual import Level, of_levels, unpack


def look_up(
    codes: Tensor, levels: Sequence[Level], tables: Sequence[Tensor], out: Tensor, add: Tensor | None = None
) -> None:
    """Write to contiguous ``out``, ``float32[n, heads, width, dim]``, the sum of the centroids of all levels.

    ``codes`` are ``uint8[n, width, heads, bytes]`` of any strides, and ``tables`` the centroids of each level,
    ``float32[groups, parts, 2**bits, dim / parts]``, each group those of ``heads / groups`` neighbouring heads. All lie
    on one device. ``add``, ``float32[n, heads, dim]``, is added at the end. On a CPU numba does it, if it is installed
    (``m3runtime[fast]``), on ``torch.get_num_threads()`` threads; torch gives the same numbers bit by bit.
    """
    if codes.device.type == "cpu" and compiled():
        by_numba(codes, levels, tables, out, add)
    else:
        by_torch(codes, levels, tables, out, add)


def by_torch(
    codes: Tensor, levels: Sequence[Level], tables: Sequence[Tensor], out: Tensor, add: Tensor | None = None
) -> None:
    """`look_up` on any device."""
    for i, (level, own, table) in enumerate(zip(levels, of_levels(codes, levels), tables, strict=True)):
        if i:
            more = torch.empty_like(out)
            _gather(unpack(own, level), table, more)
            out += more
        else:
            _gather(unpack(own, level), table, out)
    if add is not None:
        out += add[:, :, None]


def _gather(numbers: Tensor, table: Tensor, out: Tensor) -> None:
    """Write the centroids of numbers ``[n, width, heads, parts]`` to ``float32[n, heads, width, dim]``.

    One gather for all. The small numbers are put into the order of the result, not the vectors. A centroid of up to 16
    bytes is gathered as one number, which is several times as fast as a short row on a CPU.
    """
    n, width, heads, _ = numbers.shape
    groups, parts, centroids, size = table.shape
    group = torch.arange(heads, device=numbers.device) // (heads // groups)
    first = (group[:, None] * parts + torch.arange(parts, device=numbers.device)) * centroids
    index = torch.empty(n, heads, width, parts, dtype=torch.int64, device=numbers.device)
    torch.add(numbers.transpose(1, 2), first[:, None], out=index)
    one = {1: torch.float32, 2: torch.complex64, 4: torch.complex128}.get(size)
    if one is None:
        torch.index_select(table.view(-1, size), 0, index.flatten(), out=out.view(-1, size))
    else:
        torch.gather(table.view(one).flatten(), 0, index.flatten(), out=out.view(one).flatten())


def by_numba(
    codes: Tensor, levels: Sequence[Level], tables: Sequence[Tensor], out: Tensor, add: Tensor | None = None
) -> None:
    """`look_up` on a CPU. Raises `ImportError` without numba."""
    from m3runtime.codecs.product.kernels.by_numba import look_up_of, unit_of

    floats = out.numpy()
    added = (torch.empty(0, 0, 0) if add is None else add.contiguous()).numpy()
    work = []
    for i, (level, own, table) in enumerate(zip(levels, of_levels(codes, levels), tables, strict=True)):
        unit = unit_of(table.shape[3])
        rows = table.numpy().reshape(len(table), -1).view(unit)
        more = added if i == len(levels) - 1 else added[:0]
        of = (own.numpy(), level.parts, level.bits, rows, floats.view(unit), floats, i > 0, more)
        work.append(partial(look_up_of(unit), *of))

    def some(first: int, end: int) -> None:
        for kernel in work:
            kernel(first, end)

    # A thread takes neighbouring heads, of all memories: their centroids stay in its cache.
    share_out(some, out.shape[0] * out.shape[1], out.numel())
