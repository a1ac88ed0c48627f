"""Attention over ``[memories | sink | context]``, registered with transformers under the name `IMPLEMENTATION`.

A model whose attention implementation is `IMPLEMENTATION` is called with ``m3_cache=cache`` in addition to its own
cache argument. The cache builds the masks, because they depend on the layer (a layer without memories has
fewer keys) and on positions that it alone knows. The model only says which window each layer has: it asks
transformers for a mask of that kind, and gets a `Window` to hand to its layers. No other source is reliable: some
models (Phi-3.5-MoE, Qwen2-MoE) tell attention nothing of their window, others (OLMoE) tell it of one that their masks
do not have.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface

from m3model.attention.budgets import by_query_head
from m3model.attention.versions import CACHE_NAMES
from m3runtime.errors import ConfigError

IMPLEMENTATION = "m3_memory"
_OWN_CACHE = 65_536
"""Elements of a head's keys that a core's own cache holds beside its values: 256 KiB in float32."""
_SILENT = {"nemotron"}
"""Types of models whose layers hand none of their keyword arguments to attention."""


def prepare(model: Any) -> None:
    """Switch a transformers model to this attention: only a `Session` or a training pass can run it from now on."""
    AttentionInterface.register(IMPLEMENTATION, memory_attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _window)
    text = model.config.get_text_config()
    if getattr(text, "use_bidirectional_attention", None) == "vision":  # of pictures (Gemma 4), and here are none
        text.use_bidirectional_attention = None
    if text.model_type in _SILENT:
        for layer in model.get_decoder().layers:
            if _hand_down not in layer.self_attn._forward_pre_hooks.values():
                layer.self_attn.register_forward_pre_hook(_hand_down, with_kwargs=True)
    model.set_attn_implementation(IMPLEMENTATION)


def _hand_down(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hand our cache, which attention has as the library's alone, to `memory_attention` too.

    In a training pass that is the layer of the cache.
    """
    cache: Any = next((kwargs[name] for name in CACHE_NAMES if name in kwargs), None)
    if hasattr(cache, "layer"):
        cache = cache.layer(attention.layer_idx)
    return args, {**kwargs, "m3_cache": cache} if hasattr(cache, "attend") else kwargs


@dataclass(frozen=True, slots=True)
class Window:
    """Takes the place of a mask between the model and its layers."""

    tokens: int | None
    """The number of last tokens of the context that each token sees, itself included; None for all."""


@dataclass(frozen=True, slots=True)
class Weighing:
    """How a layer turns queries and keys into weights."""

    scale: float
    """The factor of the products of queries and keys."""
    softcap: float | None = None
    """The magnitude that logits stay below (Gemma 2); None for any."""
    sinks: Tensor | None = None
    """A logit for each query head, ``[Hq]``, that takes its share of the weights and gives no value (gpt-oss)."""

    @property
    def is_plain(self) -> bool:
        """Is it a softmax of products, for which there are fused kernels?"""
        return self.softcap is None and self.sinks is None


class Attending(Protocol):
    """The cache of a forward pass, which knows what each query sees.

    It is a `m3model.engine.step.StepCache`, a `m3model.attention.cache.MemoryCache`, or for gradients a
    `m3model.attention.passes.PassLayer`.
    """

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, window: int | None, weighing: "Weighing") -> Tensor:
        """Attention of queries, ``[B, Hq, Q, D]``, over the keys and values that the cache gave: ``[B, Hq, Q, Dv]``."""


class Masked:
    """A cache whose queries all read the same columns, but for a mask."""

    def mask(self, keys: int, window: int | None) -> Tensor | None:
        """The mask added to the logits of the last ``keys`` columns, ``[B, 1, Q, K]``; None if all is seen.

        ``[B, kv_heads, Q, K]`` where KV heads see different columns.
        """
        raise NotImplementedError

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, window: int | None, weighing: Weighing) -> Tensor:
        """See `Attending`."""
        mask = self.mask(keys.shape[2], window)
        if mask is not None:
            mask = mask.to(query.dtype)  # in mixed precision queries have another one than the weights
        threads = torch.get_num_threads()
        return attend(query, keys, values, mask, weighing, threads=threads)


Observer = Callable[[Tensor, Tensor, float, float | None], None]
"""Looks at queries ``[B, Hq, Q, D]``, keys ``[B, Hkv, Q, D]``, the scale of the model's logits, and their cap."""


def attend(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, weighing: Weighing, *, threads: int = 1
) -> Tensor:
    """Joint softmax over memories, sink and context (Memory³, section 3.1).

    ``query`` is ``[B, Hq, Q, D]``, ``keys`` ``[B, Hkv, K, D]``, ``values`` ``[B, Hkv, K, Dv]``, ``mask``
    ``[B, 1 or Hkv, Q, K]``, added to the logits, or None where all is seen. ``threads`` is how many compute it on a
    CPU. Returns ``[B, Hq, Q, Dv]``.
    """
    batch, heads, length, dim = query.shape
    kv_heads = keys.shape[1]
    if not weighing.is_plain:
        return _unfused(query, keys, values, mask, weighing)
    if heads == kv_heads or not _folds(query, keys, mask, threads):
        mask = None if mask is None else by_query_head(mask, heads)
        return scaled_dot_product_attention(
            query, keys, values, mask, scale=weighing.scale, enable_gqa=heads != kv_heads
        )
    if mask is not None and length > 1:
        mask = mask.repeat(1, 1, heads // kv_heads, 1)  # [B, 1 or Hkv, G * Q, K]
    folded = query.reshape(batch, kv_heads, -1, dim)  # [B, Hkv, G * Q, D]
    read = scaled_dot_product_attention(folded, keys, values, mask, scale=weighing.scale)
    return read.reshape(batch, heads, length, -1)


def attend_causally(query: Tensor, keys: Tensor, values: Tensor, weighing: Weighing) -> Tensor:
    """`attend` where each query sees its own column and all before it: plain weighing, as many queries as columns."""
    groups = query.shape[1] // keys.shape[1]
    if groups > 1 and query.is_cuda and query.dtype == torch.float32:
        # Flash attention groups heads itself, but not in float32; and the kernel that takes float32 does not group.
        keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    grouped = query.shape[1] != keys.shape[1]
    return scaled_dot_product_attention(query, keys, values, is_causal=True, scale=weighing.scale, enable_gqa=grouped)


def _unfused(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, weighing: Weighing) -> Tensor:
    """`attend` for what exists in no fused kernel: capped logits (``softcap * tanh(q.k / softcap)``), and sinks."""
    batch, heads, length, _ = query.shape
    weights = attention_weights(query, keys, mask, weighing).to(query.dtype)
    grouped = weights.reshape(batch, keys.shape[1], -1, keys.shape[2])  # [B, Hkv, G * Q, K]
    return (grouped @ values).view(batch, heads, length, -1)


def attention_weights(query: Tensor, keys: Tensor, mask: Tensor | None, weighing: Weighing) -> Tensor:
    """The weights that `attend` gives to values, float32 ``[B, Hq, Q, K]``. They sum to 1, less what sinks take."""
    batch, heads, length, dim = query.shape
    grouped = query.reshape(batch, keys.shape[1], -1, dim)  # [B, Hkv, G * Q, D]
    if weighing.softcap is None:
        logits = grouped @ keys.transpose(2, 3) * weighing.scale
    else:
        logits = torch.tanh(grouped @ keys.transpose(2, 3) * (weighing.scale / weighing.softcap)) * weighing.softcap
    logits = logits.view(batch, heads, length, -1)
    if mask is not None:
        logits = logits + by_query_head(mask, heads)
    if weighing.sinks is not None:
        sinks = weighing.sinks.to(logits.dtype)[None, :, None, None].expand(batch, -1, length, 1)
        logits = torch.cat([logits, sinks], 3)
    return logits.softmax(-1, dtype=torch.float32)[..., : keys.shape[2]]


def _folds(query: Tensor, keys: Tensor, mask: Tensor | None, threads: int) -> bool:
    """Do the query heads that share a KV head become queries of one head? If not, ``enable_gqa`` groups them.

    On a CPU neither copies keys or values, but ``enable_gqa`` goes over them once for each query head, which is dear
    where they do not stay in a core's own cache, and for many query heads. Threads share the work by head, though:
    with several of them, few query heads and short rows folding takes longer. Measured with keys and values that no
    cache holds yet, as in a model, ``enable_gqa`` took of the time of folding: on one thread 0.95 to 2.2; on two, of
    3 or 4 query heads to a KV head of 64 elements, 0.78 to 0.96; of 4 heads of 128 elements 0.93 at 60 columns, 1.4 at
    690; of 8 heads 1.0 to 1.7. On CUDA flash attention groups heads itself, but takes no mask; the memory-efficient
    kernel takes one and does not group, so that keys and values would be repeated.
    """
    if query.device.type != "cpu":
        return query.shape[2] == 1 or mask is not None
    batch, kv_heads, columns, dim = keys.shape
    shared_evenly = batch * kv_heads % threads == 0 or batch * kv_heads >= 8 * threads
    is_dear = threads == 1 or query.shape[1] > 4 * kv_heads or columns * dim > _OWN_CACHE  # to go over them again
    return query.shape[2] == 1 and shared_evenly and is_dear


def memory_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object,
    *,
    m3_cache: Attending | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    m3_observer: Observer | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention of each layer, as transformers calls it; ``key`` and ``value`` are views into the cache's buffers.

    ``s_aux`` are the layer's own sinks, see `Weighing`. With ``m3_observer`` the layer runs only to be looked at, and
    its output has no meaning. Raises `ConfigError` for a model that does not fit: with masks of its own, or that keeps
    its arguments from attention.
    """
    if m3_cache is None or not isinstance(attention_mask, Window):
        kept = "builds a mask of its own" if m3_cache is not None else "hands no arguments to its attention"
        raise ConfigError(f"{type(module).__name__} {kept}: it cannot read memories")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if m3_observer is not None:
        m3_observer(query, key, scale, softcap)
        return query.new_zeros(*query.shape[:3], value.shape[3]).transpose(1, 2), None
    read = m3_cache.attend(query, key, value, attention_mask.tokens, Weighing(scale, softcap, s_aux))
    return read.transpose(1, 2).contiguous(), None


def _window(*, config: Any, local_size: int | None = None, allow_is_causal_skip: bool = True, **_: Any) -> Window:
    """The mask that transformers is asked for. Raises `ConfigError` unless it is causal, with a window or without."""
    if not allow_is_causal_skip:  # bidirectional, or joined with a function of the model's own
        raise ConfigError(f"a model of type {config.model_type} has masks that are not causal: it cannot read memories")
    return Window(local_size)
