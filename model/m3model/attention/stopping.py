"""A forward pass that ends once the last layer that is wanted has its keys and values."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from m3model.attention.layout import Pair


class StoredError(Exception):
    """No error: a cache has what is wanted. Raised inside a forward pass, it ends the pass.

    No hook of a module can do that: projections have other names in each family.
    """


class StoringLayer(CacheLayerMixin):
    """One layer of a cache, which stores keys and values and returns those that attention reads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # it has no types
        self.is_initialized = True
        self.is_last = False
        """End the forward pass when this layer has stored its keys and values?"""

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> Pair:
        """Store keys and values, and return all that this layer's attention reads."""
        read = self.store(key_states, value_states)
        if self.is_last:
            raise StoredError
        return read

    def store(self, keys: Tensor, values: Tensor) -> Pair:
        """Store keys and values, ``[B, kv_heads, Q, head_dim]``; return all that this layer's attention reads."""
        raise NotImplementedError

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to do."""

    def get_max_length(self) -> int:
        """No bound."""
        return -1


@contextmanager
def stopping_after(cache: Any, layer: int | None) -> Iterator[None]:
    """End the forward pass within as soon as ``layer`` of a `MemoryCache` has its keys and values; None: at its end.

    Neither its attention nor any later layer is computed. The cache is as after a whole pass, but that it holds nothing
    of later layers. Only for the session's last pass, which returns nothing.
    """
    if layer is None:
        yield
        return
    cache.layers[layer].is_last = True
    try:
        yield
    except StoredError:
        cache.commit()
    finally:
        cache.layers[layer].is_last = False
