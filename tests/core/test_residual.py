"""Residual quantisers: their options, their bytes, and that numba and torch read the same out of them."""

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3runtime.codecs import layout
from m3runtime.codecs.base import Codec, Distortion
from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.codecs.product.kernels import look_up
from m3runtime.codecs.product.kernels.rotate import rotate_
from m3runtime.codecs.product.residual import Level, pack, parse, text_of, unpack
from m3runtime.errors import CodecError
from m3runtime.memory.spec import MemorySpec
from m3runtime.testing.codec import SPEC, CodecContract, identical, make_memories


class TestTwoLevelsRotated(CodecContract):
    trains = True
    worst = Distortion(keys=0.02, values=0.1)

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return ProductCodec(spec, keys="2x9+4x8", values="1x8+4x10", scope="layer", rotation="opq")


class TestOfTheWholeModel(CodecContract):
    trains = True
    worst = Distortion(keys=0.2, values=0.9)

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return ProductCodec(spec, keys="4x10", values="1x8+1x8+1x8", scope="model")


class TestCodesOfFaiss(CodecContract):
    trains = True
    worst = Distortion(keys=0.1, values=0.6)

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return ProductCodec(spec, keys="2x8+4x9", values="4x8", scope="model", rotation="opq", offset=False)


class TestNotRotated(CodecContract):
    trains = True
    worst = Distortion(keys=4e-3, values=0.15)

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return ProductCodec(spec, key_bytes=8, value_bytes=4, rotation="none")


# -- options ----------------------------------------------------------------------------------------------------------


def test_equal_codecs_have_equal_options() -> None:
    whole = {"keys": "8x8", "values": "4x8", "rotation": "pca", "scope": "head", "offset": True}
    assert ProductCodec(SPEC, 8, 4).options == whole
    assert ProductCodec(SPEC, keys=" 08x8", values="4 x 8").options == whole
    assert ProductCodec(SPEC, **whole).options == whole


def test_the_preset_is_the_quantiser_of_the_paper() -> None:
    spec = MemorySpec(tuple(range(22)), 8, 8, 80, 128, "bfloat16")
    codec = ProductCodec(spec, preset="memory3")
    levels = "2x14+8x10"
    assert codec.options == {"keys": levels, "values": levels, "rotation": "opq", "scope": "model", "offset": False}
    assert codec.payload_bytes(8) == 39_424  # reference/memory3.md: 14 bytes for each of 2816 vectors


@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 192, 256])
def test_any_head_dim_and_number_of_bytes(head_dim: int) -> None:
    spec = MemorySpec((0,), 1, 4, head_dim, 4, "float32")
    for size in (head_dim // 16, head_dim // 2):
        assert ProductCodec(spec, size, size, offset=False).payload_bytes(1) == 2 * size
    assert ProductCodec(spec, preset="memory3").payload_bytes(1) == 28


@given(st.integers(1, 300))
def test_the_preset_fits_any_head_dim(head_dim: int) -> None:
    design = ProductCodec(MemorySpec((0,), 1, 4, head_dim, 4, "float32"), preset="memory3")
    levels = parse(design.options["keys"], "keys", head_dim)  # or it raises
    assert len(levels) == 2
    assert all(level.bits <= 14 for level in levels)
    assert design.payload_bytes(1) <= 28
    if head_dim % 8 == 0:
        assert design.options["keys"] == "2x14+8x10"
    if head_dim % 10 == 0:
        assert design.payload_bytes(1) == 28


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keys": "16"}, "keys of the product codec must be levels PARTSxBITS such as 16x8 or 2x14.8x10, not '16'"),
        ({"keys": "4x8+"}, "must be levels PARTSxBITS"),
        ({"keys": "-4x8"}, "must be levels PARTSxBITS"),
        ({"values": 8}, "values of the product codec must be levels PARTSxBITS .* not 8"),
        ({"keys": "4x7"}, "a level has 8 to 16 bits, not 7 as in 4x7"),
        ({"values": "4x17"}, "a level has 8 to 16 bits, not 17 as in 4x17"),
        ({"keys": "4x8+3x8"}, "the parts of a level must divide head_dim 16, not as in 3x8"),
        ({"keys": "0x8"}, "the parts of a level must divide head_dim 16, not as in 0x8"),
        ({"keys": "4x8", "key_bytes": 4}, "key_bytes of the product codec cannot be set together with keys"),
        (
            {"preset": "memory3", "scope": "head"},
            "scope of the product codec cannot be set together with preset memory3",
        ),
        ({"preset": "memory4"}, "preset of the product codec must be one of memory3, not 'memory4'"),
        ({"rotation": "some"}, "rotation of the product codec must be one of none, pca, opq, not 'some'"),
        ({"offset": 1}, "offset of the product codec must be true or false, not 1"),
        ({"key_bytes": 3}, "key_bytes must divide head_dim 16: one of 1, 2, 4, 8, 16, not 3"),
    ],
)
def test_options_that_cannot_be_are_refused_in_one_line(options: dict[str, Any], message: str) -> None:
    defaults = {} if "preset" in options or "key_bytes" in options else {"keys": "4x8"}
    with pytest.raises(CodecError, match=message) as caught:
        ProductCodec(SPEC, **(defaults | options))
    assert "\n" not in str(caught.value)


# -- bytes ------------------------------------------------------------------------------------------------------------

levels = st.builds(Level, st.integers(1, 20), st.integers(8, 16))


@given(levels, st.integers(0, 2**32))
def test_numbers_are_packed_and_unpacked(level: Level, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, level.centroids, (3, 2, level.parts), generator=random)
    codes = torch.empty(3, 2, level.bytes, dtype=torch.uint8)
    pack(numbers, level, codes)
    assert torch.equal(unpack(codes, level).to(torch.int64), numbers)
    text = sum(number << part * level.bits for part, number in enumerate(numbers[0, 0].tolist()))
    assert bytes(codes[0, 0].tolist()) == text.to_bytes(level.bytes, "little")


@given(levels, st.integers(0, 2**32))
def test_numbers_are_packed_as_faiss_packs_them(level: Level, seed: int) -> None:
    faiss = pytest.importorskip("faiss")
    random = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, level.centroids, (5, level.parts), generator=random)
    codes = torch.empty(5, level.bytes, dtype=torch.uint8)
    pack(numbers, level, codes)
    there = faiss.pack_bitstrings(numbers.to(torch.int32).numpy(), level.bits)
    assert torch.equal(codes, torch.from_numpy(there))


@given(st.lists(levels, min_size=1, max_size=4))
def test_levels_have_one_text(some: list[Level]) -> None:
    dim = 232792560  # which all parts up to 20 divide
    assert parse(text_of(some), "keys", dim) == tuple(some)


@settings(deadline=None)  # the first compiles
@given(
    st.sampled_from([(16, (8,)), (20, (8, 10)), (24, (16, 9, 8)), (12, (11,))]),
    st.lists(st.integers(1, 4), min_size=3, max_size=3),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 2**32),
)
def test_numba_and_torch_look_up_the_same_bits(
    shape: tuple[int, tuple[int, ...]], cuts: list[int], n: int, add: bool, seed: int
) -> None:
    pytest.importorskip("numba")
    dim, bits = shape
    random = torch.Generator().manual_seed(seed)
    some = [Level(next(p for p in range(cut, 0, -1) if dim % p == 0), b) for cut, b in zip(cuts, bits, strict=False)]
    tables = [torch.randn(2, s.parts, s.centroids, dim // s.parts, generator=random) for s in some]
    slab = torch.randint(0, 256, (n, 3, 4, sum(s.bytes for s in some) + 3), dtype=torch.uint8, generator=random)
    codes = slab[..., 2:-1]
    added = torch.randn(n, 4, dim, generator=random) if add else None
    one, other = torch.full((2, n, 4, 3, dim), torch.nan)
    look_up.by_torch(codes, some, tables, one, added)
    look_up.by_numba(codes, some, tables, other, added)
    assert torch.isfinite(one).all()
    assert torch.equal(one, other)


def test_decoding_is_the_same_with_and_without_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    codec, memories = TestTwoLevelsRotated.fitted(), make_memories([12, 5, 9])
    payloads = codec.encode(memories)
    with_it = codec.decode(payloads, memories.tokens, torch.float32)
    monkeypatch.setattr(look_up, "compiled", lambda: False)
    assert identical(codec.decode(payloads, memories.tokens, torch.float32), with_it)


@pytest.mark.parametrize("of", [TestTwoLevelsRotated, TestCodesOfFaiss])
def test_a_batch_is_encoded_as_each_memory_alone(of: type[CodecContract]) -> None:
    """As a device encodes it, in one call."""
    codec, memories = of.fitted(), make_memories([12, 5, 9])
    assert isinstance(codec, ProductCodec)
    wanted = codec.encode(memories)
    found = torch.zeros_like(wanted)
    codec.quantiser.encode_all(layout.all_vectors(memories, SPEC), memories.tokens.tolist(), found)
    assert torch.equal(found, wanted)
    memories.values[1, :, :, 4] = torch.nan
    with pytest.raises(CodecError, match="memory 1 of the batch has values that are not finite"):
        layout.all_vectors(memories, SPEC)


def test_importing_the_codec_imports_neither_numba_nor_faiss() -> None:
    program = "import sys, m3runtime.codecs.product.codec; print('numba' in sys.modules, 'faiss' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


# -- rotations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 6])
@pytest.mark.parametrize("dim", [16, 64, 80])
def test_a_rotation_rounds_alike_in_any_batch(groups: int, dim: int) -> None:
    random = torch.Generator().manual_seed(0)
    matrices = torch.linalg.qr(torch.randn(groups, dim, dim, generator=random))[0].contiguous()
    x = torch.randn(3, 6, 100, dim, generator=random)
    whole = rotate_(x.clone(), matrices)
    for tokens in (1, 31, 33, 100):
        assert torch.equal(rotate_(x[1:2, :, :tokens].clone(), matrices), whole[1:2, :, :tokens])
    exact = torch.einsum("nhtd,hde->nhte", x.double(), matrices.double().expand(6, dim, dim))
    torch.testing.assert_close(whole, exact.float(), rtol=1e-5, atol=1e-5)


def correlated(scale: float = 1.0) -> Any:
    """Memories whose channels are of very different variances, mixed."""
    memories = make_memories([12] * 60, seed=8)
    mixing = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(1)))[0]
    spread = mixing * torch.logspace(0.7, -1.3, 16)[:, None] @ mixing
    memories.keys.copy_(memories.keys @ spread)
    memories.values.copy_(memories.values @ spread)
    return memories


@pytest.mark.parametrize("rotation", ["pca", "opq"])
def test_a_rotation_pays_where_channels_are_correlated(rotation: str) -> None:
    memories = correlated()
    lost = {}
    for kind in ("none", rotation):
        codec = ProductCodec(SPEC, 4, 4, "layer", rotation=kind)
        codec.fit(memories)
        lost[kind] = codec.distortion(memories).values
    assert lost[rotation] < 0.8 * lost["none"]


def test_another_level_takes_error_away() -> None:
    memories = correlated()
    lost = []
    for keys in ("1x8", "1x8+1x8", "1x8+1x8+2x8"):
        codec = ProductCodec(SPEC, keys=keys, values="1x8", scope="model")
        codec.fit(memories)
        lost.append(codec.distortion(memories).keys)
    assert lost[1] < 0.8 * lost[0]
    assert lost[2] < 0.8 * lost[1]


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"keys": "2x9+4x8", "rotation": "opq", "scope": "model"}, {"keys": "4x8"}])
def test_training_does_not_depend_on_threads(options: dict[str, Any]) -> None:
    threads, prints = torch.get_num_threads(), set()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            codec = ProductCodec(SPEC, values="4x8", **options)
            codec.fit(make_memories([12] * 24))
            assert torch.get_num_threads() == n
            prints.add((codec.fingerprint, codec.encode(make_memories([12, 7])).numpy().tobytes()))
    finally:
        torch.set_num_threads(threads)
    assert len(prints) == 1


@pytest.mark.parametrize("rotation", ["pca", "opq"])
def test_training_on_very_little_writes_nothing_to_stderr(rotation: str, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[float] = []
    codec = ProductCodec(SPEC, keys="2x9+4x8", values="2x8", scope="model", rotation=rotation)
    codec.fit(make_memories([3]), progress=seen.append)
    assert codec.distortion(make_memories([3])).keys < 0.05
    assert (seen, capfd.readouterr().err) == ([0.5, 1.0], "")


def test_the_preset_learns_heads_that_its_own_parts_do_not_divide() -> None:
    spec = MemorySpec((0,), 1, 4, 7, 4, "float32")
    codec = ProductCodec(spec, preset="memory3")
    sample = make_memories([4] * 16, spec=spec)
    codec.fit(sample)
    assert codec.measured is not None
    found = codec.distortion(sample)
    assert max(found.keys, found.values) < 0.01  # there are more centroids than vectors
