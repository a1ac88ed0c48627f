"""Rotations: products that round alike whatever the batch, and principal axes."""

import torch
from torch import Tensor

_TILE = 32
"""Tokens of one product. Always as many, because a product may round otherwise in another shape."""


def rotate_(x: Tensor, matrices: Tensor, add: Tensor | None = None) -> Tensor:
    """Multiply vectors ``float32[n, heads, tokens, dim]`` from the right, in place; then add ``add``, if given.

    ``matrices`` are ``float32[groups, dim, dim]``, each for ``heads / groups`` neighbouring heads, and ``add`` is
    ``float32[n or 1, heads, dim]``. The result for a vector depends on nothing but the vector.
    """
    n, heads, tokens, dim = x.shape
    groups = len(matrices)
    tile = x.new_zeros(heads, _TILE, dim)
    product = torch.empty_like(tile)
    as_groups = (groups, heads // groups * _TILE, dim)
    for i in range(n):
        for start in range(0, tokens, _TILE):
            some = x[i, :, start : start + _TILE]
            count = some.shape[1]
            tile[:, :count] = some
            torch.bmm(tile.view(as_groups), matrices, out=product.view(as_groups))
            if add is None:
                some.copy_(product[:, :count])
            else:
                torch.add(product[:, :count], add[i if len(add) > 1 else 0, :, None], out=some)
    return x


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
