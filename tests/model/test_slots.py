"""Memories that stay are not written again, and whatever came before, a row reads what it was given last."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from m3model.attention.cache import MemoryCache
from m3model.attention.layout import AttentionLayout, LayerShape
from m3model.attention.slots import Slot, place
from m3runtime.recall.lease import Part
from tests.model.families import make_adapter, random_text

LAYOUT = AttentionLayout(shapes=(LayerShape(2, 4, 4),) * 3, dtype=torch.float32, device=torch.device("cpu"))
MEMORY_LAYERS = (0, 2)
SINK = 2
WINDOW = 5

lengths = st.integers(0, 9)
held_and_wanted = st.lists(st.lists(st.integers(0, 7), max_size=5, unique=True), min_size=1, max_size=6)


def memory(length: int, number: int) -> Part:
    """A memory whose every key and value is its own."""
    keys = torch.arange(2 * 2 * length * 4, dtype=torch.float32).reshape(2, 2, length, 4) + 1000 * (number + 1)
    return keys, -keys


# -- places ---------------------------------------------------------------------------------------------------------


@given(sizes=st.lists(lengths, min_size=8, max_size=8), rounds=held_and_wanted, slack=st.lists(st.integers(0, 9)))
def test_slots_hold_what_is_wanted_side_by_side(sizes: list[int], rounds: list[list[int]], slack: list[int]) -> None:
    slots: dict[object, Slot] = {}
    for number, names in enumerate(rounds):
        before, wanted = slots, [(name, sizes[name]) for name in names]
        columns = sum(length for _, length in wanted) + (slack[number] if number < len(slack) else 0)
        slots = place(before, wanted, columns)
        assert {name: slot.length for name, slot in slots.items()} == dict(wanted)
        taken = [column for slot in slots.values() for column in range(slot.start, slot.end)]
        assert len(set(taken)) == len(taken)
        assert all(0 <= column < columns for column in taken)
        if before == slots or len({sizes[name] for name in {*names, *before}}) == 1:
            # Memories of one length replace each other: nobody moves who is within reach.
            assert all(slots[name] == before[name] for name in names if name in before and before[name].end <= columns)


def test_gaps_are_closed_rather_than_read() -> None:
    held = place({}, [("a", 4), ("b", 5), ("c", 3)], 12)
    assert held == {"b": Slot(0, 5), "a": Slot(5, 4), "c": Slot(9, 3)}
    wanted = [("b", 5), ("c", 3), ("d", 5)]
    # In place of a, no d fits. What stands gapless at the right end stays, and no column more than needed is read.
    assert place(held, wanted, 13) == {"b": Slot(0, 5), "c": Slot(5, 3), "d": Slot(8, 5)}
    # Where a longer row makes room anyway, everyone stays.
    assert place(held, wanted, 17) == {"b": Slot(0, 5), "c": Slot(9, 3), "d": Slot(12, 5)}


# -- a cache --------------------------------------------------------------------------------------------------------


def make_cache(batch: int, temperature: float = 1.0) -> MemoryCache:
    cache = MemoryCache(LAYOUT, MEMORY_LAYERS, batch, context=3, temperature=temperature)
    sink = torch.arange(3 * 2 * SINK * 4, dtype=torch.float32).reshape(3, 2, SINK, 4)
    cache.put_sink(sink, sink + 0.5)
    return cache


def step(cache: MemoryCache, counts: Sequence[int], marker: float) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """One forward pass of as many queries as the most of ``counts``; what the last query of each layer reads."""
    length = max(counts)
    starts = torch.full((cache.batch, 1), cache.columns)
    cache.begin(starts + torch.arange(length), torch.tensor(counts) if min(counts) < length else None)
    read = []
    for index in range(LAYOUT.layers):
        new = torch.full((cache.batch, 2, length, 4), marker)
        keys, values = cache.update(new, -new, index)
        read.append((keys.clone(), values.clone(), cache.mask(keys.shape[2], None)))
    cache.commit()
    return read


def seen(keys: Tensor, values: Tensor, mask: Tensor | None, row: int) -> list[tuple[float, ...]]:
    """The columns that the last query of a row sees, in any order: its weight, keys and values."""
    added = torch.zeros(keys.shape[2]) if mask is None else mask[row, 0, -1]
    columns = torch.cat(
        [added[:, None], keys[row].transpose(0, 1).flatten(1), values[row].transpose(0, 1).flatten(1)], 1
    )
    return sorted(tuple(column.tolist()) for column in columns if column[0] > -torch.inf)


@given(
    sizes=st.lists(lengths, min_size=8, max_size=8),
    rounds=st.lists(
        st.tuples(st.lists(st.lists(st.integers(0, 7), max_size=4), min_size=2, max_size=2), st.booleans()), max_size=6
    ),
    counts=st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=6, max_size=6),
    temperature=st.sampled_from([1.0, 2.0]),
)
def test_a_row_reads_what_a_fresh_cache_would(
    sizes: list[int], rounds: list[tuple[list[list[int]], bool]], counts: list[tuple[int, int]], temperature: float
) -> None:
    memories = [memory(length, number) for number, length in enumerate(sizes)]
    cache = make_cache(2, temperature)
    passed: list[tuple[int, int]] = []
    for number, (rows, weighted) in enumerate(rounds):
        given = [[memories[i] for i in row] for row in rows]
        weights = [[-float(i) * weighted for i in row] for row in rows]
        cache.put_memories(given, rows, weights)
        passed.append(counts[number])
        read = step(cache, counts[number], 0.25 + number)
        fresh = make_cache(2, temperature)
        for earlier in range(number):
            step(fresh, passed[earlier], 0.25 + earlier)
        fresh.put_memories(given, rows, weights)
        assert cache.used == fresh.used == max(sum(sizes[i] for i in row) for row in rows)
        for one, other in zip(read, step(fresh, counts[number], 0.25 + number), strict=True):
            assert [seen(*one, row) for row in range(2)] == [seen(*other, row) for row in range(2)]


def test_a_memory_that_stays_is_not_written_again() -> None:
    cache = make_cache(1)
    first = [memory(6, number) for number in range(3)]
    cache.put_memories([first], [["a", "b", "c"]])
    other = [memory(6, number) for number in range(10, 13)]
    cache.put_memories([[other[0], other[1], first[2]]], [["b", "d", "c"]])  # under the name of b comes another content
    read = {column[1] for column in seen(*step(cache, [1], 0.5)[0], 0)}
    assert float(first[1][0][0, 0, 0, 0]) in read
    assert float(other[0][0][0, 0, 0, 0]) not in read
    assert float(other[1][0][0, 0, 0, 0]) in read


def test_nothing_is_masked_where_nothing_needs_it() -> None:
    cache = make_cache(2)
    cache.put_memories([[memory(6, 0)], [memory(4, 1), memory(2, 2)]], [[0], [1, 2]])
    assert [mask for *_, mask in step(cache, [1, 1], 0.5)] == [None] * 3
    # Rows of different length: layers with memories need a mask, the others do not.
    cache.put_memories([[memory(6, 0)], [memory(4, 1)]], [[0], [1]])
    with_memory, without, _ = (mask for *_, mask in step(cache, [1, 1], 0.5))
    assert with_memory is not None
    assert without is None
    # And a decode step's mask is no new tensor.
    assert with_memory.untyped_storage().data_ptr() == cache._bias.untyped_storage().data_ptr()
    cache.put_memories([[memory(6, 0)], [memory(6, 3)]], [[0], [3]])
    assert step(cache, [1, 1], 0.5)[0][2] is None


@pytest.mark.parametrize("family", ["llama", "mistral-sliding", "gemma3_text", "gemma2"])
@pytest.mark.parametrize("settings", [{}, {"sinks": "each", "positions": "sequential", "layers": (1, 2)}])
def test_sequences_at_different_chunk_positions(family: str, settings: dict[str, object]) -> None:
    """Memories change in one row while the other goes on; each reads as if alone, with fresh tensors each time."""
    adapter = make_adapter(family, **settings)
    texts = [random_text(adapter.tokenizer, length, seed=length) for length in (4, 20, 11, 20)]
    encoded = adapter.encode(texts)

    def part(index: int) -> Part:
        tokens = int(encoded.tokens[index])
        return encoded.keys[index, :, :, :tokens].clone(), encoded.values[index, :, :, :tokens].clone()

    choices: list[list[list[int]]] = [[[1, 2], [0]], [[1, 3], [0]], [[1, 3], [3, 0]], [[3, 2], []], [[2, 3], [3]]]
    session, alone = adapter.session(2, context=2), [adapter.session(1) for _ in range(2)]
    tokens = torch.arange(60).reshape(5, 2, 6) % 300 + 10
    for number, choice in enumerate(choices):
        session.read([[part(i) for i in row] for row in choice], ids=choice)
        counts = [6, 1 + number] if number % 2 else [1, 5]
        together = [session.forward(tokens[number, :, : max(counts)], counts)]
        together += [session.forward(tokens[number, :, :1]) for _ in range(3)]
        for row, one in enumerate(alone):
            one.read([[part(i) for i in choice[row]]])
            apart = [one.forward(tokens[number, row : row + 1, : counts[row]])]
            apart += [one.forward(tokens[number, row : row + 1, :1]) for _ in range(3)]
            for this, that in zip(together, apart, strict=True):
                assert (this[row] - that[0]).abs().max() < 1e-4
