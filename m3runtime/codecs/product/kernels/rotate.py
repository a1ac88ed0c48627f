"""`rotate_`: products of vectors and matrices that round alike whatever the batch."""

import torch
from torch import Tensor

_TILE = 32
"""Tokens of one product. Always as many, because a product may round otherwise in another shape."""


def rotate_(x: Tensor, matrices: Tensor, add: Tensor | None = None) -> Tensor:
    """Multiply vectors ``[n, heads, tokens, dim]`` from the right, in place; then add ``add``, if given.

    ``matrices`` are ``[groups, dim, dim]`` of the same dtype, each for ``heads / groups`` neighbouring heads, and
    ``add`` is ``[n or 1, heads, dim]``. The result for a vector depends on nothing but the vector.
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
