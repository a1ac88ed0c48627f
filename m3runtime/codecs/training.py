"""Training of the product codec's centroids by faiss."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

from m3runtime.codecs.base import Progress
from m3runtime.errors import PluginError

try:
    import faiss
except ImportError as error:
    raise PluginError("training the product codec needs faiss: pip install 'm3runtime[train]'") from error

_SEED = 3
_ITERATIONS = 10
_MOST_VECTORS = 8192
"""For each group; more of them change the distortion by less than one part in a hundred, and take time."""
_BLAS_FROM = 20
"""Vectors from which faiss compares by matrix products. Its own setting, 128,000 since 1.15, makes k-means
over few dimensions fourteen times as slow."""
_one_at_a_time = threading.Lock()


def train(jobs: Sequence[tuple[Tensor, int]], centroids: int, progress: Progress | None = None) -> list[Tensor]:
    """Product quantisers for jobs of vectors ``float32[groups, vectors, dim]`` and a number of parts.

    Gives ``float32[groups, parts, centroids, dim / parts]`` of each. Deterministic, whatever the number of
    threads. Trainings wait for each other, because they change a setting of faiss that holds for the whole
    process.
    """
    noise = torch.Generator().manual_seed(_SEED)
    work = [(group, parts) for vectors, parts in jobs for group in _prepared(vectors, centroids, noise)]
    done: list[Tensor] = []
    # Each thread trains whole quantisers by itself: threads inside of one wait for each other at every
    # iteration, which is ten times as slow when something else has a core. That also leaves OpenMP's pool to
    # torch.
    with _one_at_a_time, _blas(), ThreadPoolExecutor(torch.get_num_threads()) as pool:
        futures = [pool.submit(_quantiser, group, parts, centroids) for group, parts in work]
        try:
            for future in futures:
                done.append(future.result())
                if progress:
                    progress(len(done) / len(work))
        finally:
            for future in futures:
                future.cancel()
    trained, start = [], 0
    for vectors, _ in jobs:
        trained.append(torch.stack(done[start : start + len(vectors)]))
        start += len(vectors)
    return trained


def _prepared(vectors: Tensor, centroids: int, noise: torch.Generator) -> Iterator[Tensor]:
    """A sample of each group's vectors. Fewer vectors than centroids are repeated with noise."""
    count = vectors.shape[1]
    order = torch.randperm(count, generator=noise)[:_MOST_VECTORS]
    if count < centroids:
        order = order.repeat(-(-centroids // count))
    for group in vectors:
        chosen = group[order]
        if count < centroids:
            spread = chosen.std(0, correction=0) / 2
            chosen[count:] += spread * torch.randn(chosen[count:].shape, generator=noise)
        yield chosen


def _quantiser(vectors: Tensor, parts: int, centroids: int) -> Tensor:
    """The centroids of one group, ``float32[parts, centroids, dim / parts]``."""
    faiss.omp_set_num_threads(1)  # holds for this thread only
    quantiser = faiss.ProductQuantizer(vectors.shape[1], parts, (centroids - 1).bit_length())
    quantiser.cp.niter = _ITERATIONS
    quantiser.cp.seed = _SEED
    quantiser.cp.min_points_per_centroid = 1  # or faiss writes a warning to stderr
    quantiser.cp.max_points_per_centroid = _MOST_VECTORS
    quantiser.train(vectors.numpy())
    found = torch.from_numpy(faiss.vector_to_array(quantiser.centroids).copy())
    return found.view(parts, centroids, -1)


@contextmanager
def _blas() -> Iterator[None]:
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = _BLAS_FROM
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before
