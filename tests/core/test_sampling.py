"""Laws of the reservoir."""

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from weakref import WeakSet

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.writing.sampling import reservoir

SEEDS = st.integers(0, 2**32)


@given(items=st.lists(st.text(max_size=3)), size=st.integers(0, 40), seed=SEEDS)
def test_size_subset_and_order(items: list[str], size: int, seed: int) -> None:
    places = reservoir(range(len(items)), size, seed)
    assert len(places) == min(size, len(items))
    assert all(a < b for a, b in pairwise(places))
    assert all(place in range(len(items)) for place in places)
    # What is drawn does not depend on what the items are; and the same is drawn again.
    assert reservoir(items, size, seed) == [items[place] for place in places] == reservoir(iter(items), size, seed)


@given(count=st.integers(0, 30), more=st.integers(0, 5), seed=SEEDS)
def test_a_short_stream_is_kept_whole(count: int, more: int, seed: int) -> None:
    assert reservoir(range(count), count + more, seed) == list(range(count))


@pytest.mark.parametrize(("size", "count"), [(1, 2), (1, 10), (3, 10), (9, 10), (5, 50)])
def test_every_item_and_every_pair_is_as_likely(size: int, count: int) -> None:
    rounds = 6000
    ones: Counter[int] = Counter()
    pairs: Counter[tuple[int, int]] = Counter()
    for seed in range(rounds):
        found = reservoir(range(count), size, seed)
        ones.update(found)
        pairs.update((a, b) for a in found for b in found if a < b)
    _alike([ones[i] for i in range(count)], rounds * size / count, rounds)
    together = rounds * size * (size - 1) / (count * (count - 1))
    _alike([pairs[a, b] for b in range(count) for a in range(b)], together, rounds)


def _alike(found: list[int], expected: float, rounds: int) -> None:
    deviation = (expected * (1 - expected / rounds)) ** 0.5
    assert all(abs(times - expected) <= 4.5 * deviation for times in found), (found, expected)


def test_no_more_is_kept_than_drawn() -> None:
    class Item:
        pass

    alive: WeakSet[Item] = WeakSet()
    most = 0

    def stream() -> Iterator[Item]:
        nonlocal most
        for _ in range(500):
            item = Item()
            alive.add(item)
            most = max(most, len(alive))
            yield item

    assert len(reservoir(stream(), 7)) == 7
    assert most <= 7 + 3  # the newest, and what the two loops still name


def test_a_negative_size() -> None:
    with pytest.raises(ValueError, match="not -1"):
        reservoir([1], -1)
