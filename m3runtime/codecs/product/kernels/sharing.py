"""Compiled kernels on CPUs: `compiled` says if there are any, `share_out` runs them on several threads."""

import threading
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import torch

_WORTH_A_THREAD = 1 << 18
"""Numbers to be computed from which one more thread saves more time than it takes to start."""


@cache
def compiled() -> bool:
    """True if numba is installed (``m3runtime[fast]``) and accepts the installed numpy."""
    try:
        import m3runtime.codecs.product.kernels.by_numba  # noqa: F401 - takes a second, so not before it is needed
    except ImportError:
        return False
    return True


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
