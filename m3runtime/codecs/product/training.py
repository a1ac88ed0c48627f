"""Training of the product codec's rotations and centroids by faiss."""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from m3runtime.codecs.base import Progress
from m3runtime.codecs.kernels.lookup import look_up
from m3runtime.codecs.kernels.nearest import nearest, scorer
from m3runtime.codecs.product.packing import Stage, pack
from m3runtime.codecs.product.rotation import principal, rotate_
from m3runtime.errors import PluginError

try:
    import faiss
except ImportError as error:
    raise PluginError("training the product codec needs faiss: pip install 'm3runtime[train]'") from error

_SEED = 3
_ITERATIONS = 10
_MORE_ITERATIONS = 25
"""With more vectors than `_MOST_VECTORS`, where they are quick: 1 to 4 in a hundred less error on those of SmolLM2."""
_QUICK = 1024
"""Centroids."""
_MOST_VECTORS = 8192
"""For each group; more of them change the distortion by less than one part in a hundred, and take time."""
_BLAS_FROM = 20
"""Vectors from which faiss compares by matrix products. Its own setting, 128,000 since 1.15, makes k-means
over few dimensions fourteen times as slow."""
_MOST_TOGETHER = 2**17
"""For all groups, where that gives each more: the vectors of a whole model are more varied than those of a head."""
_MOST_DISTANCES = 2**30
"""From vectors to centroids, for all groups, where that is fewer: k-means takes a minute then."""
_FOR_EACH_CENTROID = 4
"""For each group, as many vectors for a centroid, whatever it takes."""
_ROTATION_STEPS = 10
"""Of OPQ, from the principal axes. faiss by itself takes 50 from a random rotation, and ends with more error."""
_AT_ONCE = 1024
"""Vectors whose distances to all centroids are held at once."""
_one_at_a_time = threading.Lock()
_W = TypeVar("_W")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Job:
    """Quantisers to be trained, one for each group of ``vectors``, ``float32[groups, vectors, dim]``."""

    vectors: Tensor
    stages: tuple[Stage, ...]
    rotation: str
    """``none``, ``pca`` or ``opq``."""


@dataclass(frozen=True)
class Trained:
    """What a `Job` gave. A vector ``x`` is quantised as ``(x - mean) @ rotation``."""

    tables: tuple[Tensor, ...]  # of each stage, float32[groups, parts, 2**bits, dim / parts]
    rotation: Tensor | None  # float32[groups, dim, dim], orthogonal; None for none
    mean: Tensor | None  # float32[groups, dim], of pca; else None


def train_stages(jobs: Sequence[Job], progress: Progress | None = None) -> list[Trained]:
    """Quantisers in stages, each stage trained on what those before it left over. Deterministic, like `train`."""
    noise = torch.Generator().manual_seed(_SEED)
    work = []
    for job in jobs:
        centroids = max(stage.centroids for stage in job.stages)
        most = _most(centroids, len(job.vectors))
        work += [(group, job) for group in _prepared(job.vectors, centroids, most, noise)]
    done = iter(_each(_staged, work, progress))
    trained = []
    for job in jobs:
        tables, rotations, means = zip(*(next(done) for _ in job.vectors), strict=True)
        of_stages = tuple(map(torch.stack, zip(*tables, strict=True)))
        trained.append(Trained(of_stages, _stacked(rotations), _stacked(means)))
    return trained


def train(jobs: Sequence[tuple[Tensor, int]], centroids: int, progress: Progress | None = None) -> list[Tensor]:
    """Product quantisers for jobs of vectors ``float32[groups, vectors, dim]`` and a number of parts.

    Gives ``float32[groups, parts, centroids, dim / parts]`` of each. Deterministic, whatever the number of
    threads. Trainings wait for each other, because they change a setting of faiss that holds for the whole
    process.
    """
    noise = torch.Generator().manual_seed(_SEED)
    work = [(group, parts) for vectors, parts in jobs for group in _prepared(vectors, centroids, _MOST_VECTORS, noise)]
    done = _each(lambda item: _quantiser(item[0], item[1], centroids), work, progress)
    trained, start = [], 0
    for vectors, _ in jobs:
        trained.append(torch.stack(done[start : start + len(vectors)]))
        start += len(vectors)
    return trained


def _each(work: Callable[[_W], _R], items: Sequence[_W], progress: Progress | None) -> list[_R]:
    """The result for each item, in their order, as many at a time as torch has threads.

    Each thread trains whole quantisers by itself: threads inside of one wait for each other at every iteration, which
    is ten times as slow when something else has a core. That also leaves OpenMP's pool to torch.
    """

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


def _prepared(vectors: Tensor, centroids: int, most: int, noise: torch.Generator) -> Iterator[Tensor]:
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


def _most(centroids: int, groups: int) -> int:
    """How many vectors of each of so many groups train the stages of a quantiser."""
    together = min(_MOST_TOGETHER, _MOST_DISTANCES // centroids)
    return max(_MOST_VECTORS, _FOR_EACH_CENTROID * centroids, together // groups)


def _staged(item: tuple[Tensor, Job]) -> tuple[list[Tensor], Tensor | None, Tensor | None]:
    """Tables of each stage, the rotation and the mean of one group."""
    vectors, job = item
    rotation = mean = None
    if job.rotation == "pca":
        mean, rotation = principal(vectors, max(stage.parts for stage in job.stages))
        vectors = vectors - mean
    elif job.rotation == "opq":
        rotation = _optimised(vectors, _rotated_parts(job.stages, vectors.shape[1]))
    if rotation is not None:
        vectors = rotate_(vectors.clone()[None, None], rotation[None])[0, 0]
    tables = []
    for i, stage in enumerate(job.stages):
        tables.append(_quantiser(vectors, stage.parts, stage.centroids))
        if i < len(job.stages) - 1:
            parts = (vectors[at : at + _AT_ONCE] for at in range(0, len(vectors), _AT_ONCE))
            vectors = torch.cat([_left_over(some, stage, tables[-1]) for some in parts])
    return tables, rotation, mean


def _left_over(vectors: Tensor, stage: Stage, table: Tensor) -> Tensor:
    """Vectors ``[n, dim]`` less what a stage makes of them."""
    numbers = torch.empty(len(vectors), 1, stage.parts, dtype=torch.int32)
    nearest(vectors[None], scorer(table[None]), 1, numbers)
    codes = torch.empty(1, len(vectors), 1, stage.bytes, dtype=torch.uint8)
    pack(numbers[None], stage, codes)
    said = torch.empty_like(vectors)
    look_up(codes, [stage], [table[None]], said[None, None])
    return vectors - said


def _rotated_parts(stages: Sequence[Stage], dim: int) -> int:
    """For how many parts OPQ optimises: those of a single stage, else parts of 4 channels as the paper's OPQ20_80.

    Or of as nearly 4 as divides them.
    """
    if len(stages) == 1:
        return stages[0].parts
    return min((parts for parts in range(1, dim + 1) if dim % parts == 0), key=lambda parts: abs(parts - dim / 4))


def _optimised(vectors: Tensor, parts: int) -> Tensor:
    """The rotation of OPQ, ``float32[dim, dim]``.

    It starts from the principal axes, as Ge et al. do, and not at random like faiss.
    """
    dim = vectors.shape[1]
    rotation = faiss.OPQMatrix(dim, parts, dim)
    _, axes = principal(vectors, parts)
    faiss.copy_array_to_vector(axes.T.contiguous().flatten().numpy(), rotation.A)
    quantiser = faiss.ProductQuantizer(dim, parts, 8)
    _settle(quantiser)
    rotation.pq = quantiser
    rotation.niter = _ROTATION_STEPS
    rotation.max_train_points = _MOST_VECTORS
    rotation.train(vectors.numpy())
    return torch.from_numpy(faiss.vector_to_array(rotation.A).copy()).view(dim, dim).T.contiguous()


def _quantiser(vectors: Tensor, parts: int, centroids: int) -> Tensor:
    """The centroids of one group, ``float32[parts, centroids, dim / parts]``."""
    quantiser = faiss.ProductQuantizer(vectors.shape[1], parts, (centroids - 1).bit_length())
    _settle(quantiser)
    more = len(vectors) > _MOST_VECTORS and centroids <= _QUICK
    quantiser.cp.niter = _MORE_ITERATIONS if more else _ITERATIONS
    quantiser.train(vectors.contiguous().numpy())
    found = torch.from_numpy(faiss.vector_to_array(quantiser.centroids).copy())
    return found.view(parts, centroids, -1)


def _settle(quantiser: faiss.ProductQuantizer) -> None:
    quantiser.cp.seed = _SEED
    quantiser.cp.min_points_per_centroid = 1  # or faiss writes a warning to stderr
    quantiser.cp.max_points_per_centroid = _MOST_TOGETHER  # all


def _stacked(tensors: Sequence[Tensor | None]) -> Tensor | None:
    found = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(found) if found else None


@contextmanager
def by_blas() -> Iterator[None]:
    """Let faiss compare by matrix products meanwhile. A setting of the whole process."""
    before = faiss.cvar.distance_compute_blas_threshold
    faiss.cvar.distance_compute_blas_threshold = _BLAS_FROM
    try:
        yield
    finally:
        faiss.cvar.distance_compute_blas_threshold = before
