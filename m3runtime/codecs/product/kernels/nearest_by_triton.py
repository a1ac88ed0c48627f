"""The nearest centroids as one Triton kernel, for CUDA devices. Imported when first used, where Triton is installed.

A program compares some tokens of one part with all its centroids: scores never leave its registers. They are summed in
one order, whatever else is in the batch, so that equal vectors get equal codes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_TOKENS = 32
"""Tokens of a program."""


def nearest(x: Tensor, places: Tensor, against: Tensor, out: Tensor) -> None:
    """`m3runtime.codecs.product.kernels.nearest.nearest` for float32 on a CUDA device.

    ``x`` is contiguous in its last dimension, and ``out`` is ``uint8[tokens, parts]``, contiguous in its last.
    """
    tokens, parts = out.shape
    _, rows, centroids = against.shape
    if not tokens * parts:
        return
    with torch.cuda.device(x.get_device() if x.is_cuda else -1):  # Triton launches on the current one
        nearest_tile[parts, triton.cdiv(tokens, _TOKENS)](
            x,
            x.stride(0),
            x.stride(1),
            tokens,
            places,
            against,
            out,
            out.stride(0),
            SIZE=rows - 1,
            CENTROIDS=centroids,
            TILE=_TOKENS,
        )


@triton.jit(do_not_specialize=["row_step", "token_step", "tokens", "out_step"])  # type: ignore[untyped-decorator]
def nearest_tile(  # type: ignore[no-untyped-def] # what is written as a type is compiled, too
    x,  # float32
    row_step,
    token_step,
    tokens,
    places,  # int64[parts, 3]: row, first number, table
    against,  # float32[tables, SIZE + 1, CENTROIDS]: centroids, and minus half of their squares
    out,  # uint8
    out_step,
    SIZE: tl.constexpr,  # noqa: N803 - constants of the compilation, by the convention of Triton
    CENTROIDS: tl.constexpr,  # noqa: N803
    TILE: tl.constexpr,  # noqa: N803
):
    """Programs: parts, by tiles of tokens."""
    part = tl.program_id(0)
    token = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    exists = token < tokens
    row, first, table = tl.load(places + part * 3), tl.load(places + part * 3 + 1), tl.load(places + part * 3 + 2)
    numbers = x + row * row_step + token * token_step + first
    centroid = against + table * (SIZE + 1) * CENTROIDS + tl.arange(0, CENTROIDS)
    score = tl.zeros((TILE, CENTROIDS), tl.float32)
    for number in tl.static_range(SIZE):
        cut = tl.load(numbers + number, mask=exists, other=0.0)
        score += cut[:, None] * tl.load(centroid + number * CENTROIDS)[None, :]
    score += tl.load(centroid + SIZE * CENTROIDS)[None, :]
    code = tl.argmax(score, axis=1)
    tl.store(out + token * out_step + part, code.to(tl.uint8), mask=exists)
