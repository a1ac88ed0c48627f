"""FlexAttention: attention under a rule instead of a mask, in one kernel that leaves out blocks that nobody sees.

Triton compiles the kernel, so it is for CUDA devices. Elsewhere the library computes it unfused, without gradients:
that is for tests.
"""

import importlib.util
import logging
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

__all__ = ["BlockMask", "Rule", "added_mask", "block_mask", "can_flex", "flexible"]

log = logging.getLogger("m3runtime")

Rule = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Does a query see a column? Given the row, the head, the query and the column, as tensors that broadcast."""


@cache
def can_flex(device: torch.device) -> bool:
    """Is there a fused kernel for this device? It is tried out at the first call, with gradients."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    try:
        query, keys, values = (torch.randn(1, 2, 128, 64, device=device, requires_grad=True) for _ in range(3))
        with torch.enable_grad():
            mask = block_mask(lambda row, head, query, column: column <= query, 1, 128, 128, device)  # noqa: ARG005
            torch.autograd.backward(flexible(query, keys, values, mask, 1.0).sum())
    except Exception as error:  # noqa: BLE001 - no types of error are documented
        log.warning("FlexAttention failed, so training is slower: %s: %s", type(error).__name__, error)
        return False
    return True


def block_mask(rule: Rule, rows: int, queries: int, columns: int, device: torch.device) -> BlockMask:
    """The blocks of columns that each block of queries sees; the same for all heads."""
    return create_block_mask(rule, rows, None, queries, columns, device=str(device))


def added_mask(rule: Rule, rows: int, queries: int, columns: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The same rule as numbers that are added to logits, ``[rows, 1, queries, columns]``: zero or -inf."""
    places = [torch.arange(count, device=device) for count in (rows, 1, queries, columns)]
    row, head, query, column = (one.view([-1 if at == dim else 1 for at in range(4)]) for dim, one in enumerate(places))
    seen = rule(row, head, query, column).expand(rows, 1, -1, -1)
    return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def flexible(query: Tensor, keys: Tensor, values: Tensor, mask: BlockMask, scale: float) -> Tensor:
    """Attention as of `m3model.attention.implementation.attend`, under a rule."""
    # Within a layer that is compiled as a whole, the kernel becomes a part of it.
    attend: Any = _compiled() if query.is_cuda and not torch.compiler.is_compiling() else flex_attention
    read: Tensor = attend(query, keys, values, block_mask=mask, scale=scale, enable_gqa=query.shape[1] != keys.shape[1])
    return read


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention)
