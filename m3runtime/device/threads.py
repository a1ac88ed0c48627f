"""Threads that compute: on which device, and on how many cores."""

import ctypes
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

_CHANGING = threading.Lock()
_CORES = threading.Lock()
_SOFTLY = 1
"""``omp_pause_soft`` of OpenMP 5.0."""
_PROCESS = os.getpid()


def compute_on(threads: int) -> None:
    """Let the calling thread compute on this many threads; all others compute as before.

    OpenMP and MKL keep that number for each thread, and so does what the codecs start threads by. But torch also gives
    the number that was set last to every thread that computes for the first time, so it is set back, by a thread that
    ends at once.
    """
    with _CHANGING, ThreadPoolExecutor(1) as other:
        before = other.submit(torch.get_num_threads).result()
        torch.set_num_threads(threads)
        torch.get_num_threads()  # from now on the number that is set last does not reach this thread
        with ThreadPoolExecutor(1) as another:
            another.submit(torch.set_num_threads, before).result()


def release() -> None:
    """End the helpers with which the calling thread computes on several cores; others come when it computes again.

    Each thread that computes so has helpers of its own. While all threads of the process are no more than the cores,
    libgomp lets helpers wait a little for the next operation; with more of them they sleep at once, and waking them for
    each operation costs a step of a model several percent. So who has computed, and now waits for another thread,
    gives its own back. Where the OpenMP library does not offer it, nothing happens; nor in a forked process, which has
    no helpers of its parent's, and would wait for them for ever.
    """
    if os.getpid() != _PROCESS:
        return
    library = ctypes.CDLL(torch._C.__file__)  # and what it is linked to
    pause = getattr(library, "omp_pause_resource", None)
    if pause is not None:
        pause(_SOFTLY, library.omp_get_initial_device())


@contextmanager
def turn(device: torch.device, *, keep: bool = False) -> Iterator[None]:
    """Compute in the block on all cores: on a CPU, other threads that ask for a turn wait meanwhile.

    Two models that compute at once on the same cores take longer than one after the other, since each operation waits
    for the thread that shares its core with the other model's. At the end the thread's helpers end, see `release`,
    unless it says with ``keep`` that it computes again at once. Not reentrant.
    """
    if device.type != "cpu":
        yield
        return
    if not _CORES.acquire(blocking=False):
        release()
        _CORES.acquire()
    try:
        yield
    finally:
        if not keep:
            release()
        _CORES.release()


def prepare(device: torch.device, cores: int) -> None:
    """Let the calling thread compute on ``device`` and on this many cores. Every thread of a runtime calls it first.

    Which accelerator is the current one is a property of each thread, and a new thread begins with the first.
    """
    if device.index is not None:
        torch.accelerator.set_device_index(device.index)
    compute_on(cores)
