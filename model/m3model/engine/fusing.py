"""Layers that are compiled for the engine's steps: what stands between matrix products becomes a few kernels.

A layer is compiled up to its attention and from there on, so norms, rotation, gates and residuals are fused, and
attention stays a kernel of its own. All layers of a kind share graphs, which hold for any number of tokens.
"""

from typing import Any

import torch
from torch import Tensor

from m3model.attention.compiled import Compiled
from m3model.attention.implementation import Weighing
from m3model.attention.layout import Pair
from m3model.attention.versions import CACHE_NAMES
from m3model.engine.packing import unpack
from m3model.engine.step import StepCache


class _Alone:
    """A layer of a `StepCache` without its number, by which each layer would get graphs of its own."""

    def __init__(self, cache: StepCache, index: int) -> None:
        self._places = cache.places[index]
        self._cache = cache

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> Pair:
        """Write keys and values; see `m3model.attention.stopping.StoringLayer.update`."""
        self._places.write(keys, values)
        return self._places.read

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # it has no types
    def attend(self, query: Tensor, keys: Tensor, values: Tensor, window: int | None, weighing: Weighing) -> Tensor:
        """See `m3model.attention.implementation.Attending`."""
        return self._cache.attend(query, keys, values, window, weighing)


class _FusedLayer:
    """Stands for the ``forward`` of a layer: compiled in the engine's steps, and as it was in all other passes."""

    def __init__(self, forward: Any, index: int, backend: Any) -> None:
        self._forward = forward
        self._index = index
        self._compiled = Compiled(forward, backend, "decoding", dynamic=True)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("m3_cache")
        if not isinstance(cache, StepCache):
            return self._forward(*args, **kwargs)
        alone = _Alone(cache, self._index)
        given = {name: alone for name in ("m3_cache", *CACHE_NAMES) if name in kwargs}
        return self._compiled(*args, **{**kwargs, **given})


def fuse(model: Any, backend: Any = "inductor") -> None:
    """Compile the layers of a model at the engine's first steps. A layer that cannot be compiled runs as it is.

    Calling it again is fine. ``backend`` is that of `torch.compile`. Weights are packed no more, for the compiler has
    products of its own.
    """
    unpack(model)
    for index, layer in enumerate(model.get_decoder().layers):
        if not isinstance(layer.forward, _FusedLayer):
            layer.forward = _FusedLayer(layer.forward, index, backend)
