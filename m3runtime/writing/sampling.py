"""`reservoir`: a uniform sample of a stream."""

import random
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def reservoir(items: Iterable[T], size: int, seed: int = 0) -> list[T]:
    """A uniform sample of ``size`` items, or all of them if there are fewer, in the order of the stream.

    Algorithm R (Vitter 1985): no more than ``size`` items are kept at any time. Deterministic: the places drawn depend
    on the number of items alone. Raises `ValueError` for a negative size.
    """
    if size < 0:
        raise ValueError(f"a sample has at least no items, not {size}")
    draw = random.Random(seed).random  # the one method whose numbers are the same in every release of Python
    kept: list[tuple[int, T]] = []
    for place, item in enumerate(items):
        if place < size:
            kept.append((place, item))
            continue
        # Of so many items the newest is in the sample with probability size / (place + 1), whoever leaves for it.
        slot = int(draw() * (place + 1))
        if slot < size:
            kept[slot] = (place, item)
    return [item for _, item in sorted(kept, key=lambda pair: pair[0])]
