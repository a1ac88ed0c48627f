"""k-means by faiss: the centroids that both designs of the `product` codec learn."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from m3runtime.codecs.base import Progress

_SEED = 3
_ITERATIONS = 10
_MORE_ITERATIONS = 25
"""With more vectors than `MOST_VECTORS`, where they are quick: 1 to 4 in a hundred less error on those of SmolLM2."""
_QUICK = 1024
"""Centroids."""
MOST_VECTORS = 8192
"""For each group; more of them change the distortion by less than one part in a hundred, and take time."""
_BLAS_FROM = 20
"""Vectors from which faiss compares by matrix products. Its own setting, 128,000 since 1.15, makes k-means
over few dimensions fourteen times as slow."""
_MOST_TOGETHER = 2**17
"""Vectors that faiss takes for one set of centroids at most."""
_one_at_a_time = threading.Lock()
_W = TypeVar("_W")
_R = TypeVar("_R")


def new_noise() -> torch.Generator:
    """The random numbers of one training, always the same."""
    return torch.Generator().manual_seed(_SEED)


def each(work: Callable[[_W], _R], items: Sequence[_W], progress: Progress | None) -> list[_R]:
    """The result for each item, in their order, as many at a time as torch has threads.

    Calls wait for each other, because they change a setting of faiss that holds for the whole process. Each thread
    trains whole quantisers by itself: threads inside of one wait for each other at every iteration, which is ten times
    as slow when something else has a core. That also leaves OpenMP's pool to torch.
    """
    import faiss

    def alone(item: _W) -> _R:
        faiss.omp_set_num_threads(1)  # holds for this thread only
        torch.set_num_threads(1)
        return work(item)

    done: list[_R] = []
    threads = torch.get_num_threads()
    with _one_at_a_time, by_blas(), ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(alone, item) for item in items]
        try:
            for future in futures:
                done.append(future.result())
                if progress:
                    progress(len(done) / len(items))
        finally:
            for future in futures:
                future.cancel()
            torch.set_num_threads(threads)  # part of the setting is the whole process's
    return done


def sampled(vectors: Tensor, centroids: int, most: int, noise: torch.Generator) -> Iterator[Tensor]:
    """A sample of each group's vectors. Fewer vectors than centroids are repeated with noise."""
    count = vectors.shape[1]
    order = torch.randperm(count, generator=noise)[:most]
    if count < centroids:
        order = order.repeat(-(-centroids // count))
    for group in vectors:
        chosen = group[order]
        if count < centroids:
            spread = chosen.std(0, correction=0) / 2
            chosen[count:] += spread * torch.randn(chosen[count:].shape, generator=noise)
        yield chosen


def quantiser(vectors: Tensor, parts: int, centroids: int) -> Tensor:
    """The centroids of one group, ``float32[parts, centroids, dim / parts]``."""
    import faiss

    made = settled(faiss.ProductQuantizer(vectors.shape[1], parts, (centroids - 1).bit_length()))
    more = len(vectors) > MOST_VECTORS and centroids <= _QUICK
    made.cp.niter = _MORE_ITERATIONS if more else _ITERATIONS
    made.train(vectors.contiguous().numpy())
    found = torch.from_numpy(faiss.vector_to_array(made.centroids).copy())
    return found.view(parts, centroids, -1)


def settled(quantiser: Any) -> Any:
    """A `faiss.ProductQuantizer` that trains on all that it is given, always from the same start."""
    quantiser.cp.seed = _SEED
    quantiser.cp.min_points_per_centroid = 1  # or faiss writes a warning to stderr
    quantiser.cp.max_points_per_centroid = _MOST_TOGETHER  # all
    return quantiser


@contextmanager
def by_blas() -> Iterator[None]:
    """Let faiss compare by matrix products meanwhile. A setting of the whole process."""
    import faiss

    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = _BLAS_FROM
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before
