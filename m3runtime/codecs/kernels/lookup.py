"""The centroids that codes stand for, the work of decoding: one call for all memories, layers and heads."""

import threading
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from m3runtime.codecs.product.packing import Stage, of_stages, unpack

_WORTH_A_THREAD = 1 << 18
"""Numbers to be written from which a thread more saves more time than it takes to start."""


def look_up(
    codes: Tensor, stages: Sequence[Stage], tables: Sequence[Tensor], out: Tensor, add: Tensor | None = None
) -> None:
    """Write to contiguous ``out``, ``float32[n, heads, width, dim]``, what codes stand for.

    ``codes`` are ``uint8[n, width, heads, bytes]`` of any strides, and ``tables`` the centroids of each stage,
    ``float32[groups, parts, 2**bits, dim / parts]``, each group those of ``heads / groups`` neighbouring heads. What
    the stages say is added up in their order, and then ``add``, where it is given, ``float32[n, heads, dim]``. On a
    CPU numba does it, if it is installed (``m3runtime[fast]``), on ``torch.get_num_threads()`` threads; torch gives
    the same numbers bit by bit.
    """
    if codes.device.type == "cpu" and compiled():
        by_numba(codes, stages, tables, out, add)
    else:
        by_torch(codes, stages, tables, out, add)


@cache
def compiled() -> bool:
    """Whether numba can be used: it is installed, and accepts the numpy that is."""
    try:
        from m3runtime.codecs.kernels import lookup_numba  # noqa: F401 - now, so that it is there when needed
    except ImportError:
        return False
    return True


def by_torch(
    codes: Tensor, stages: Sequence[Stage], tables: Sequence[Tensor], out: Tensor, add: Tensor | None = None
) -> None:
    """`look_up` on any device."""
    for i, (stage, own, table) in enumerate(zip(stages, of_stages(codes, stages), tables, strict=True)):
        if i:
            more = torch.empty_like(out)
            _gather(unpack(own, stage), table, more)
            out += more
        else:
            _gather(unpack(own, stage), table, out)
    if add is not None:
        out += add[:, :, None]


def _gather(numbers: Tensor, table: Tensor, out: Tensor) -> None:
    """Write the centroids of numbers ``[n, width, heads, parts]`` to ``float32[n, heads, width, dim]``.

    One gather for all. The small numbers are brought into the order of the result, not the vectors. A centroid of up
    to 16 bytes is gathered as one number, which is several times as fast as a short row on a CPU.
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
    codes: Tensor, stages: Sequence[Stage], tables: Sequence[Tensor], out: Tensor, add: Tensor | None = None
) -> None:
    """`look_up` on a CPU. Raises `ImportError` without numba."""
    from m3runtime.codecs.kernels import lookup_numba

    floats = out.numpy()
    added = torch.empty(0, 0, 0).numpy() if add is None else add.contiguous().numpy()
    work = []
    for i, (stage, own, table) in enumerate(zip(stages, of_stages(codes, stages), tables, strict=True)):
        unit = lookup_numba.unit(table.shape[3])
        rows = table.numpy().reshape(len(table), -1).view(unit)
        last = i == len(stages) - 1
        more = added if last else added[:0]
        work.append((own.numpy(), stage.parts, stage.bits, rows, floats.view(unit), floats, i > 0, more))

    def some(first: int, end: int) -> None:
        for arguments in work:
            lookup_numba.look_up(*arguments, first, end)

    # A thread takes neighbouring heads, of all memories: their centroids stay in its cache.
    share_out(some, out.shape[0] * out.shape[1], out.numel())


def share_out(work: Callable[[int, int], None], jobs: int, numbers: int) -> None:
    """Call ``work(first, end)`` for all jobs, on ``torch.get_num_threads()`` threads if so many numbers are worth it.

    ``work`` must let other threads run, and not raise.
    """
    count = max(1, min(torch.get_num_threads(), jobs, numbers // _WORTH_A_THREAD))
    shares = list(pairwise(jobs * i // count for i in range(count + 1)))
    threads = [threading.Thread(target=work, args=share) for share in shares[1:]]
    for thread in threads:
        thread.start()
    work(*shares[0])
    for thread in threads:
        thread.join()
