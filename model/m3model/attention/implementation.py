"""Attention over ``[memories | sink | context]``, registered with transformers under the name `IMPLEMENTATION`.

A model whose attention implementation is `IMPLEMENTATION` is called with ``m3_cache=cache`` beside
its own cache argument. Masks are not built by transformers but by `MemoryCache.mask`, because they depend on the
layer (a layer without memories has fewer keys) and on positions that only the cache knows.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from m3runtime.errors import ConfigError

IMPLEMENTATION = "m3_memory"


class Masking(Protocol):
    """What a forward pass keeps its keys and values in.

    It is a `m3model.attention.cache.MemoryCache`, or where gradients are asked for a `m3model.attention.passes.Pass`.
    """

    def mask(self, keys: int, window: int | None) -> Tensor | None:
        """What is added to the logits of the last ``keys`` columns, ``[B, 1, Q, K]``; None if nothing."""


Observer = Callable[[Tensor, Tensor, float, float | None], None]
"""Looks at queries ``[B, Hq, Q, D]``, keys ``[B, Hkv, Q, D]``, what the model scales logits by, and their cap."""


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, *, scale: float, softcap: float | None = None
) -> Tensor:
    """Joint softmax over memories, sink and context (Memory³, section 3.1).

    ``query`` is ``[B, Hq, Q, D]``, ``keys`` and ``values`` ``[B, Hkv, K, D]``, ``mask`` ``[B, 1, Q, K]``, added to the
    logits, or None where all is seen. Returns ``[B, Hq, Q, D]``.
    """
    batch, heads, length, dim = query.shape
    kv_heads = keys.shape[1]
    if softcap is not None:
        # Capped logits (Gemma 2) exist in no fused kernel: softcap * tanh(q.k / softcap) before the mask.
        grouped = query.reshape(batch, kv_heads, -1, dim)  # [B, Hkv, G * Q, D]
        logits = torch.tanh(grouped @ keys.transpose(2, 3) * (scale / softcap)) * softcap
        logits = logits.view(batch, heads, length, -1)
        if mask is not None:
            logits = logits + mask
        weights = logits.softmax(-1, dtype=torch.float32).to(query.dtype)
        return (weights.view(batch, kv_heads, -1, keys.shape[2]) @ values).view(batch, heads, length, dim)
    if heads == kv_heads or not _folds(query, kv_heads, mask):
        return scaled_dot_product_attention(query, keys, values, mask, scale=scale, enable_gqa=heads != kv_heads)
    if mask is not None and length > 1:
        mask = mask.repeat(1, 1, heads // kv_heads, 1)  # [B, 1, G * Q, K]
    folded = query.reshape(batch, kv_heads, -1, dim)  # [B, Hkv, G * Q, D]
    return scaled_dot_product_attention(folded, keys, values, mask, scale=scale).reshape(batch, heads, length, dim)


def _folds(query: Tensor, kv_heads: int, mask: Tensor | None) -> bool:
    """Whether to let the query heads that share a KV head be queries of one head, and not rely on ``enable_gqa``.

    On a CPU neither copies keys or values, but ``enable_gqa`` goes over them once for each query head: at one query,
    9 heads over 3, 760 columns and one thread it takes 147 us against 140 us folded (batch 1), 1.22 ms against 1.16 ms
    (batch 8); with an additive mask the same. Threads share the work by head, though: 3 heads on two threads take
    110 us against 92 us of 9. On CUDA flash attention groups heads itself, but takes no mask; the
    memory-efficient kernel takes one and does not group, so that keys and values would be repeated.
    """
    if query.device.type != "cpu":
        return query.shape[2] == 1 or mask is not None
    units, threads = query.shape[0] * kv_heads, torch.get_num_threads()
    return query.shape[2] == 1 and (units % threads == 0 or units >= 8 * threads)


def memory_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    *,
    m3_cache: Masking,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    m3_observer: Observer | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer; ``key`` and ``value`` are views into the cache's buffers.

    With ``m3_observer`` the layer runs only to be looked at, and its output has no meaning.
    """
    if s_aux is not None:
        raise ConfigError("the model has attention sinks of its own, beside which memories cannot be read")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if m3_observer is not None:
        m3_observer(query, key, scale, softcap)
        return query.transpose(1, 2), None
    mask = m3_cache.mask(key.shape[2], sliding_window)
    if mask is not None:
        mask = mask.to(query.dtype)  # in mixed precision queries have another one than the weights
    return attend(query, key, value, mask, scale=scale, softcap=softcap).transpose(1, 2).contiguous(), None


def _no_mask(*_: Any, **__: Any) -> None:
    """The cache builds the mask, layer by layer."""


AttentionInterface.register(IMPLEMENTATION, memory_attention)
AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
