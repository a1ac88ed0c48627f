"""Training of a `ResidualDesign`: rotations, and the centroids of each level on the residuals of those before it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from m3runtime.codecs.base import Progress
from m3runtime.codecs.product.kernels.nearest import nearest, scorer
from m3runtime.codecs.product.kernels.rotate import rotate_
from m3runtime.codecs.product.kmeans import MOST_VECTORS, each, quantiser, sampled, settled
from m3runtime.codecs.product.residual import Level
from m3runtime.codecs.product.residual_quantiser import Tables
from m3runtime.codecs.steps import Steps

_MOST_TOGETHER = 2**17
"""For all groups, where that gives each more: the vectors of a whole model are more varied than those of a head."""
_MOST_DISTANCES = 2**30
"""From vectors to centroids, for all groups, where that is fewer: k-means takes a minute then."""
_FOR_EACH_CENTROID = 4
"""For each group, as many vectors for a centroid, whatever it takes."""
_ROTATION_STEPS = 10
"""Iterations of OPQ from the principal axes. faiss takes 50 from a random rotation, and ends with more error."""


def train_levels(
    vectors: Tensor,
    levels: tuple[Level, ...],
    rotation: str,
    noise: torch.Generator,
    progress: Progress | None,
    steps: Steps,
    name: str,
) -> Tables:
    """The tables of ``levels`` that quantise vectors ``float32[groups, vectors, dim]``.

    ``rotation`` is ``none``, ``pca`` or ``opq``; ``name`` tells these steps from others. Deterministic, whatever the
    number of threads.
    """
    centroids = max(level.centroids for level in levels)
    work = enumerate(sampled(vectors, centroids, _most(centroids, len(vectors)), noise))

    def trained(item: tuple[int, Tensor]) -> Mapping[str, Tensor]:
        number, group = item
        return steps.take(f"{name}-{number}", lambda: _trained(group, levels, rotation).tensors(""))

    found = each(trained, list(work), progress)
    return Tables.of("", levels, {key: torch.cat([of[key] for of in found]) for key in found[0]})


def _most(centroids: int, groups: int) -> int:
    """The number of vectors of each of so many groups that train the levels of a quantiser."""
    together = min(_MOST_TOGETHER, _MOST_DISTANCES // centroids)
    return max(MOST_VECTORS, _FOR_EACH_CENTROID * centroids, together // groups)


def _trained(vectors: Tensor, levels: tuple[Level, ...], rotation: str) -> Tables:
    """The tables of one group of vectors ``float32[n, dim]``."""
    axes = mean = None
    if rotation == "pca":
        mean, axes = principal(vectors, max(level.parts for level in levels))
        vectors = vectors - mean
    elif rotation == "opq":
        axes = _optimised(vectors, _rotated_parts(levels, vectors.shape[1]))
    if axes is not None:
        vectors = rotate_(vectors.clone()[None, None], axes[None])[0, 0]
    centroids: list[Tensor] = []
    for level in levels:
        if centroids:
            vectors = _residual(vectors, levels[len(centroids) - 1], centroids[-1])
        centroids.append(quantiser(vectors, level.parts, level.centroids))
    of_group = tuple(table[None] for table in centroids)
    return Tables(levels, of_group, None if axes is None else axes[None], None if mean is None else mean[None])


def _residual(vectors: Tensor, level: Level, table: Tensor) -> Tensor:
    """Vectors ``[n, dim]`` minus the nearest centroids of a level, ``[parts, centroids, dim / parts]``."""
    numbers = torch.empty(len(vectors), level.parts, dtype=torch.int32)
    nearest(vectors[None], level.places(1, vectors.shape[1]), scorer(table), numbers)
    return vectors - table[torch.arange(level.parts), numbers.long()].flatten(1)


def _rotated_parts(levels: Sequence[Level], dim: int) -> int:
    """For how many parts OPQ optimises: those of a single level, else parts of 4 channels as the paper's OPQ20_80.

    Or of as nearly 4 as divides them.
    """
    if len(levels) == 1:
        return levels[0].parts
    return min((parts for parts in range(1, dim + 1) if dim % parts == 0), key=lambda parts: abs(parts - dim / 4))


def _optimised(vectors: Tensor, parts: int) -> Tensor:
    """The rotation of OPQ, ``float32[dim, dim]``.

    It starts from the principal axes, as Ge et al. do, and not at random like faiss.
    """
    import faiss

    dim = vectors.shape[1]
    rotation = faiss.OPQMatrix(dim, parts, dim)
    _, axes = principal(vectors, parts)
    faiss.copy_array_to_vector(axes.T.contiguous().flatten().numpy(), rotation.A)
    made = settled(faiss.ProductQuantizer(dim, parts, 8))
    rotation.pq = made  # which does not keep it alive
    rotation.niter = _ROTATION_STEPS
    rotation.max_train_points = MOST_VECTORS
    rotation.train(vectors.numpy())
    return torch.from_numpy(faiss.vector_to_array(rotation.A).copy()).view(dim, dim).T.contiguous()


def principal(vectors: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Mean ``[dim]`` of vectors, and their principal axes as columns, ``[dim, dim]``.

    The axes are dealt to parts so that the products of the variances in all parts are about the same, which is best
    for a product quantiser of Gaussian vectors: section 3.2 of Ge et al., "Optimized Product Quantization", 2013.
    ``vectors`` are ``float32[n, dim]``, at least one.
    """
    count, dim = vectors.shape
    mean = vectors.mean(0)
    centred = (vectors - mean).double()
    variances, axes = torch.linalg.eigh(centred.T @ centred / count)
    floor = 1e-12 * variances[-1].clamp_min(1e-30)
    gains = (variances / floor).clamp_min(1).log2().tolist()  # positive: no part is better for having fewer
    dealt: list[list[int]] = [[] for _ in range(parts)]
    sums = [0.0] * parts
    for axis in range(dim - 1, -1, -1):  # the greatest variance is the last
        part = min((part for part in range(parts) if len(dealt[part]) < dim // parts), key=sums.__getitem__)
        dealt[part].append(axis)
        sums[part] += gains[axis]
    return mean, axes[:, [axis for part in dealt for axis in part]].float()
