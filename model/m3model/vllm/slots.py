"""`Slots`: keys and values of sink, memories and empty slots, as vLLM's cache is to have them.

Memories were computed in an interval of positions that ends where the context begins. Here the context begins behind
all slots, so all keys are rotated on by the difference. Then every distance is as it was.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from m3runtime.bank.bias import BiasDirections
from m3runtime.recall.lease import Part

CACHE_BYTES = 256 << 20

Turn = tuple[Tensor, Tensor]
"""Cosines and sines: see `m3model.vllm.compat.turn`."""


class Slots:
    """Arranges memories for some KV heads of a model. One thread; `arrange` returns views of one buffer."""

    def __init__(
        self,
        bias: BiasDirections,
        slots: int,
        turn: Turn,
        *,
        heads: slice,
        temperature: float,
        log_weight: float,
        dtype: torch.dtype,
        device: torch.device,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """``turn`` rotates keys on to where they are read; ``heads`` are the worker's own KV heads."""
        self._heads, self._dtype, self._device = heads, dtype, device
        self._layers = list(bias.facts.layers)
        self._temperature = temperature
        self._log_weight = log_weight
        self._turn = (turn[0].to(device), turn[1].to(device))
        keys, values = (self._own(one) for one in (bias.sink_keys, bias.sink_values))
        self.sink = keys.shape[1]
        """Tokens of the sink."""
        direction = self._rotated(bias.directions[:, heads].to(device).float())
        layers, own_heads, dim = direction.shape
        self._direction = direction[self._layers, None]  # [memory layers, 1, heads, dim]
        shape = (layers, self.sink + slots, own_heads, dim)
        self._keys, self._values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        self._keys[:, : self.sink], self._values[:, : self.sink] = self._rotated(keys), values
        self._empty = (-bias.facts.null_level * direction).to(dtype)[:, None]
        self._rows = torch.tensor(self._layers, device=device)
        self._cache = OrderedDict[int, Part]()
        self._room, self._bytes = cache_bytes, 0

    def arrange(self, ids: Sequence[int], parts: Sequence[Part], log_weights: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Keys and values of sink and slots, ``[layers, sink + slots, heads, head_dim]``, memories first.

        The parts are ``[memory layers, kv_heads, tokens, head_dim]`` of all KV heads of the model.
        """
        at = self.sink
        self._keys[:, at:] = self._empty  # also in layers that have no memories
        self._values[:, at:] = 0
        for id, part, weight in zip(ids, parts, log_weights, strict=True):
            keys, values = self._moved(id, part)
            end = at + keys.shape[1]
            added = weight + self._log_weight
            biased = keys if added == 0 else (keys.float() + added * self._direction).to(self._dtype)
            self._keys[self._rows, at:end] = biased
            self._values[self._rows, at:end] = values
            at = end
        while self._bytes > self._room:  # only now: whatever `has` was true of is needed until here
            self._bytes -= _size(self._cache.popitem(last=False)[1])
        return self._keys, self._values

    def has(self, id: int) -> bool:
        """Is this memory in the cache of rotated ones? Then the next `arrange` does not need its part."""
        return id in self._cache

    def _moved(self, id: int, part: Part) -> Part:
        """A memory at the positions at which it is read, from the cache if it is there."""
        if id in self._cache:
            self._cache.move_to_end(id)
            return self._cache[id]
        keys, values = (self._own(one) for one in part)
        moved = ((self._rotated(keys) / self._temperature).to(self._dtype), values.to(self._dtype))
        self._cache[id] = moved
        self._bytes += _size(moved)
        return moved

    def _own(self, tensor: Tensor) -> Tensor:
        """``[layers, kv_heads, tokens, dim]`` of the model as ``[layers, tokens, heads, dim]`` of the worker."""
        return tensor[:, self._heads].to(self._device).float().transpose(1, 2)

    def _rotated(self, keys: Tensor) -> Tensor:
        """Keys, float32 ``[..., dim]``, rotated in halves; what lies behind the rotated dimensions stays."""
        cos, sin = self._turn
        half = len(cos)
        first, second, rest = keys[..., :half], keys[..., half : 2 * half], keys[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def _size(part: Part) -> int:
    keys, values = part
    return keys.nbytes + values.nbytes
