"""`stopping_after`: a forward pass that ends where nothing more is wanted of it."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from m3model.attention.cache import MemoryCache


class _StoredError(Exception):
    """No error: what was wanted is in the cache."""


@contextmanager
def stopping_after(cache: MemoryCache, layer: int) -> Iterator[None]:
    """End the forward pass within as soon as ``layer`` has put its keys and values into the cache.

    Neither its attention nor any later layer is computed. The cache is as after a whole pass, but that it holds nothing
    of later layers. Only for the session's last pass, which returns nothing.
    """
    at = cache.layers[layer]
    update = at.update  # type: ignore[union-attr]  # typed as any layer of the library

    def last(key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> None:
        update(key_states, value_states)
        raise _StoredError

    # No hook of a module says when that is: projections have other names in each family.
    at.__dict__["update"] = last
    try:
        yield
    except _StoredError:
        cache.commit()
    finally:
        del at.__dict__["update"]
