"""The queries of a model as its attention sees them: after normalisation and RoPE, with the scale of its logits."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from m3model.attention.implementation import Masked, Weighing


@dataclass(frozen=True, slots=True)
class Asked:
    """What one layer's attention is asked in a forward pass."""

    layer: int
    query: Tensor
    """``[B, Hq, Q, D]``."""
    keys: Tensor
    """``[B, Hkv, K, D]``: memories, sink and context."""
    window: int | None
    scaling: Weighing
    cache: Masked

    def grouped(self, every: int = 1) -> Tensor:
        """The scaled queries of each KV head, float32 ``[Hkv, B * G * Q, D]``; of ``every`` n-th token alone."""
        query = self.query[:, :, every - 1 :: every].float() * self.scaling.scale
        batch, heads, length, dim = query.shape
        kv_heads = self.keys.shape[1]
        grouped = query.reshape(batch, kv_heads, heads // kv_heads * length, dim)
        return grouped.transpose(0, 1).reshape(kv_heads, -1, dim)

    def weighing(self, every: int) -> tuple[Tensor, Tensor]:
        """How every n-th token's queries weigh what they see, two of float32 ``[Hkv, B * G * n]``.

        The logarithm of the sum of all weights, a layer's own sinks not counted; and the share of a small rise of a
        key's logit that a cap takes back, on average over what the query attends to: zero in a model without one.
        """
        every = min(every, self.query.shape[2])
        keys = self.keys.float().transpose(0, 1)  # [Hkv, B, K, D]
        kv_heads, batch, columns, dim = keys.shape
        logits = capped(self.grouped(every).view(kv_heads, batch, -1, dim) @ keys.transpose(2, 3), self.scaling.softcap)
        seen = logits  # [Hkv, B, G * n, K]
        mask = self.cache.mask(columns, self.window)
        if mask is not None:
            rows = mask if mask.shape[2] == 1 else mask[:, :, every - 1 :: every]  # [B, 1, n, K]
            by_head = logits.view(kv_heads, batch, -1, self.query.shape[2] // every, columns)
            seen = (by_head + rows.float()).view_as(logits)
        total = seen.logsumexp(-1)
        taken = torch.zeros_like(total)
        if self.scaling.softcap is not None:
            taken = ((seen - total[..., None]).exp() * (logits / self.scaling.softcap).square()).sum(-1)
        return total.flatten(1), taken.flatten(1)


def capped(logits: Tensor, softcap: float | None) -> Tensor:
    """Logits under the model's cap (Gemma 2), or as they are."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


@contextmanager
def watched(model: Any, look: Callable[[Asked], None]) -> Iterator[None]:
    """Let ``look`` see what every layer is asked in every forward pass meanwhile.

    The model must be one that `m3model.attention.implementation.prepare` prepared, and be run by a `Session`. Any
    family will do: attention is called once in each layer, in order. One thread.
    """

    def before(_: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "m3_cache": _Watched(kwargs["m3_cache"], look)}

    hook = model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


class _Watched:
    """The cache of one forward pass, as attention asks it; see `m3model.attention.implementation.Attending`."""

    def __init__(self, cache: Masked, look: Callable[[Asked], None]) -> None:
        self._cache, self._look = cache, look
        self._layer = 0

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, window: int | None, weighing: Weighing) -> Tensor:
        """Look, then let the cache attend."""
        self._look(Asked(self._layer, query, keys, window, weighing, self._cache))
        self._layer += 1
        return self._cache.attend(query, keys, values, window, weighing)
