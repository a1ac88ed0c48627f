"""Sizes and costs that `m3runtime.planning` computes."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.codecs.raw import RawCodec
from m3runtime.config.schema import Config, MemoryConfig, ModelConfig
from m3runtime.errors import ConfigError
from m3runtime.memory.block import HEADER_BYTES
from m3runtime.memory.shape import MODELS, ModelShape, described, memory_layers, memory_spec
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.planning.bank import Need, plan, sized
from m3runtime.planning.cost import cost
from m3runtime.planning.drive import PAGE, Drive, reads
from m3runtime.planning.store import Prices, store_cost
from tests.core.recalling import TextAdapter

PAPER = MODELS["memory3-2.4b"]
SPEC = MemorySpec(tuple(range(22)), 8, 8, 80, 128, "bfloat16")
NEED = Need(references=112_000_000, text_bytes=512, dim=1024)


def config(**sections: Any) -> Config:
    required = {"bank": ".", "model": {"path": "none"}, "embedder": {"path": "none"}, "tiers": [{"kind": "lmdb"}]}
    return Config.model_validate({**required, **sections})


def three(number: float) -> float:
    """As the paper prints numbers: three digits that matter."""
    return float(f"{number:.3g}")


sizes = st.integers(1, 12)
shapes = st.builds(
    lambda layers, hidden, kv_heads, group, head_dim, mlp, vocabulary, gated: ModelShape(
        layers, 8 * hidden, kv_heads * group, kv_heads, 2 * head_dim, 8 * mlp, 100 * vocabulary, gated
    ),
    sizes,
    sizes,
    st.integers(1, 4),
    st.integers(1, 4),
    sizes,
    sizes,
    sizes,
    st.booleans(),
)


@st.composite
def planned(draw: st.DrawFn) -> tuple[ModelShape, MemorySpec]:
    """A shape, and a spec of memories that such a model can have."""
    shape = draw(shapes)
    layers = draw(st.sets(st.integers(0, shape.layers - 1), min_size=1).map(lambda found: tuple(sorted(found))))
    reference = draw(st.integers(1, 128))
    tokens = draw(st.integers(1, reference))
    return shape, MemorySpec(layers, shape.kv_heads, tokens, shape.head_dim, reference, "float32")


# What the paper prints of its own model


def test_the_cost_of_the_paper() -> None:
    found = cost(PAPER, SPEC, chunk_tokens=64, memories=5)
    tera = 1e12
    assert three(found.train / tera) == 2.24
    assert three(found.write / tera) == 0.308
    assert three(found.read / tera) == 0.000144
    assert three(found.text / tera) == 0.624
    assert found.over_text is not None
    assert three(found.over_text) == 0.494
    assert three(found.under_parameters) == 13_400
    assert round(100 * found.read_share, 2) == 0.23


def test_the_bytes_of_the_paper() -> None:
    found = plan(config(memory={"preset": "memory3"}), PAPER, NEED, "paper")
    assert found.spec == replace(SPEC, dtype=found.spec.dtype)
    memory = found.memory
    assert (memory.raw, memory.kept, memory.payload) == (72_089_600, 450_560, 39_424)
    assert memory.block == 39_424 + HEADER_BYTES
    assert memory.raw / memory.kept == 160
    assert three(memory.raw / memory.payload) == 1830
    assert three(450_560 / 39_424) == 11.4
    # It calls powers of 1024 TB and PB.
    references = found.references
    assert three(memory.raw * references / 1024**5) == 7.17
    assert three(memory.kept * references / 1024**4) == 45.9
    assert three(memory.payload * references / 1024**4) == 4.02


# Laws of the cost


@given(planned(), st.integers(1, 64), st.integers(1, 9))
def test_between_its_bounds_memory_is_cheapest(of: tuple[ModelShape, MemorySpec], chunk: int, memories: int) -> None:
    found = cost(*of, chunk_tokens=chunk, memories=memories)

    def by_memory(uses: float) -> float:
        return found.write + uses * found.read

    for uses in (0.5 * found.under_parameters, 2 * found.under_parameters + 1):
        assert (by_memory(uses) < found.train) == (uses < found.under_parameters)
    if found.over_text is None:
        assert by_memory(1e9) >= 1e9 * found.text
    else:
        for uses in (0.5 * found.over_text, 2 * found.over_text):
            assert (by_memory(uses) < uses * found.text) == (uses > found.over_text)


@given(planned())
def test_memories_of_the_last_layer_cost_what_reading_the_text_does(of: tuple[ModelShape, MemorySpec]) -> None:
    shape, spec = of
    costs = [
        cost(shape, replace(spec, layers=tuple(range(last + 1))), chunk_tokens=64, memories=5)
        for last in range(shape.layers)
    ]
    writing = [found.write for found in costs]
    assert writing == sorted(set(writing))  # deeper is dearer
    assert writing[-1] == costs[-1].text
    assert len({found.text for found in costs}) == 1


@given(planned(), st.integers(2, 5))
def test_reading_costs_in_proportion(of: tuple[ModelShape, MemorySpec], times: int) -> None:
    shape, spec = of
    one = cost(shape, spec, chunk_tokens=8, memories=1)
    assert cost(shape, spec, chunk_tokens=8 * times, memories=1).read == times * one.read
    wider = replace(spec, tokens=spec.tokens * times, reference_tokens=spec.reference_tokens * times)
    assert cost(shape, wider, chunk_tokens=8, memories=1).read == times * one.read
    assert cost(shape, spec, chunk_tokens=8, memories=times).read_share == pytest.approx(times * one.read_share)


# Laws of the bytes


@given(planned(), st.integers(1, 10**9), st.integers(1, 2000))
def test_a_plan_counts_what_a_codec_makes(of: tuple[ModelShape, MemorySpec], references: int, dim: int) -> None:
    shape, spec = of
    memory = {
        "layers": list(spec.layers),
        "tokens_per_head": spec.tokens,
        "reference_tokens": spec.reference_tokens,
    }
    settings = config(memory=memory, codec={"kind": "raw"}, model={"path": "none", "dtype": "bfloat16"})
    found = plan(settings, shape, Need(references, 7, dim), "some")
    assert found.spec == replace(spec, dtype="bfloat16")
    zeros = torch.zeros(1, len(spec.layers), spec.kv_heads, spec.tokens, spec.head_dim, dtype=torch.bfloat16)
    written = RawCodec(found.spec).encode(MemoryTensors(zeros, zeros, torch.tensor([spec.tokens])))
    assert found.memory.payload == found.memory.kept == written.shape[1]
    assert found.memory.block == found.memory.payload + HEADER_BYTES
    assert found.memory.kept <= found.memory.cache <= found.memory.raw
    assert found.memory.raw == found.memory.cache * shape.heads // shape.kv_heads
    assert found.bank.blocks == references * found.memory.block
    assert (found.bank.texts, found.bank.embeddings) == (7 * references, 4 * dim * references)
    assert found.bank.total == found.bank.blocks + found.bank.texts + found.bank.embeddings


@given(st.lists(st.integers(1, 2**50), max_size=3), st.integers(0, 2**40), st.integers(1, 10**9))
def test_a_tier_holds_whole_blocks(tried: list[int], capacity: int, references: int) -> None:
    tiers = [{"kind": "pinned", "capacity": capacity}, {"kind": "mine", "size": 7}, {"kind": "lmdb", "max_size": 9}]
    settings = config(memory={"preset": "memory3"}, tiers=tiers)
    found = plan(settings, PAPER, replace(NEED, references=references, capacities=tuple(tried)), "paper")
    # What states no capacity is left out, and so is the home.
    assert [(room.tier, room.capacity) for room in found.tiers] == [
        ("pinned", capacity),
        *(("--capacity", size) for size in tried),
    ]
    for room in found.tiers:
        assert room.memories * found.memory.block <= room.capacity < (room.memories + 1) * found.memory.block
        assert room.share == min(1, room.memories / references)


def test_default_tiers_are_planned_with() -> None:
    found = plan(config(memory={"preset": "memory3"}, tiers=[]), PAPER, NEED, "paper")
    assert found.tiers[-1].tier == "pinned"
    assert found.tiers[-1].memories > 0


# Laws of the drive


@given(
    st.none() | st.integers(1, 2**40),
    st.none() | st.integers(1, 10**7),
    st.integers(1, 10**7),
    st.integers(1, 9),
    st.integers(1, 64),
)
def test_a_drive_is_used_up_and_no_more(
    bandwidth: int | None, iops: int | None, block: int, memories: int, chunk: int
) -> None:
    found = reads(Drive(bandwidth, iops, 20.0), block, memories, chunk)
    if found is None:
        assert bandwidth is iops is None
        return
    assert block <= found.read_bytes < block + PAGE
    assert found.read_bytes % PAGE == 0
    used = {}
    if bandwidth is not None:
        used["bandwidth"] = found.reads_per_s * found.read_bytes / bandwidth
    if iops is not None:
        used["iops"] = found.reads_per_s / iops
    assert used[found.limit] == pytest.approx(1)
    assert max(used.values()) <= 1 + 1e-9
    assert found.recalls_per_s * memories == pytest.approx(found.reads_per_s)
    assert found.tokens_per_s == pytest.approx(found.recalls_per_s * chunk)
    assert found.streams == pytest.approx(found.tokens_per_s / 20)


# Shapes


def spelled(shape: ModelShape) -> str:
    return ",".join(f"{name}={str(value).lower()}" for name, value in asdict(shape).items())


@given(shapes, shapes)
def test_a_shape_is_read_as_it_is_spelled(shape: ModelShape, other: ModelShape) -> None:
    assert described(spelled(shape)) == described(spelled(shape), other) == shape
    assert described("", shape) == shape
    assert described(f" mlp = {other.mlp} ", shape) == replace(shape, mlp=other.mlp)


def test_what_a_shape_leaves_out() -> None:
    assert described("layers=30,hidden=576,heads=9,mlp=1536,vocabulary=49152") == ModelShape(
        30, 576, 9, 9, 64, 1536, 49_152, True, "bfloat16"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers", "layers: write it as NAME=VALUE, such as layers=30"),
        ("layer=3", "layer is not known; did you mean layers?"),
        ("layers=0", "layers must be a whole number such as 1000 or 1e8, from 1 to 1e18, not '0'"),
        ("layers=many", "layers must be a whole number such as"),
        ("gated=no", "gated must be true or false, not 'no'"),
        ("layers=1,hidden=8,heads=2", "mlp, vocabulary are missing"),
        ("layers=1,hidden=9,heads=2,mlp=4,vocabulary=8", "heads (2) do not divide hidden (9); give head_dim too"),
        ("layers=1,hidden=8,heads=4,kv_heads=3,mlp=4,vocabulary=8", "kv_heads (3) must divide its heads (4)"),
        ("layers=1,hidden=8,heads=4,mlp=4,vocabulary=8,dtype=int8", "dtype must be one of float32, float16, bfloat16"),
    ],
)
def test_a_wrong_shape_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        described(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@given(st.integers(1, 200))
def test_halves_of_the_layers(count: int) -> None:
    def chosen(layers: Any) -> tuple[int, ...]:
        return memory_layers(MemoryConfig(layers=layers), count)

    assert chosen("all") == tuple(range(count))
    assert chosen("first-half") == tuple(range(count // 2))
    middle = chosen("middle-half")
    assert len(middle) == count // 2
    assert middle == tuple(range(count // 4, count // 4 + count // 2))
    assert chosen(f"0-{count - 1}") == tuple(range(count))
    with pytest.raises(ConfigError, match=rf"memory\.layers: the model has layers 0 to {count - 1}, not "):
        chosen(f"0-{count}")


def test_the_middle_of_the_paper_s_model() -> None:
    spec = memory_spec(MemoryConfig(layers="middle-half"), layers=44, kv_heads=8, head_dim=80, dtype="float32")
    assert spec.layers == tuple(range(11, 33))


# Models that are not loaded


class Told(TextAdapter):
    """An adapter that tells shapes, and that its models carry their memories."""

    @classmethod
    def shape(cls, model: ModelConfig) -> ModelShape:
        return replace(PAPER, layers=int(Path(model.path).name))

    @classmethod
    def carried(cls, model: ModelConfig, memory: MemoryConfig) -> MemoryConfig:
        return memory.model_copy(update={"tokens_per_head": 8})


class Silent(TextAdapter):
    """An adapter that tells no shapes."""


def test_an_adapter_tells_the_shape() -> None:
    settings = config(model={"path": "models/7", "adapter": f"{__name__}:Told"})
    carrying, shape = sized(settings)
    assert shape == replace(PAPER, layers=7)
    assert carrying.memory.tokens_per_head == 8
    assert plan(carrying, shape, Need(1, 1, 1), "told").spec.tokens == 8


def test_an_adapter_that_tells_none() -> None:
    settings = config(model={"path": "x", "adapter": f"{__name__}:Silent"})
    with pytest.raises(ConfigError, match=r"^model\.adapter: .*:Silent does not tell .*; say it with --shape$"):
        sized(settings)


def test_reads_of_a_store_grow_as_the_tables_fragments_do() -> None:
    """A table is indexed again after 20,000 references or a sixteenth of all: fragments that a commit looks at."""
    sizes = (100_000, 10**8, 2 * 10**8)
    small, large, larger = (store_cost(Prices(), references=size, stored=0, memories=5).gets / size for size in sizes)
    assert large > 100 * small
    assert larger == pytest.approx(2 * large, rel=0.01)
