"""The transform of the `product` codec: its bytes go where errors cost most."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from m3runtime.codecs.base import Codec, Distortion
from m3runtime.codecs.product import transform_quantiser
from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.codecs.product.transform import WIDTHS
from m3runtime.codecs.product.transform_design import TransformDesign
from m3runtime.codecs.product.transform_training import divide, lloyd
from m3runtime.errors import CodecError
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.testing.codec import SPEC, UNEVEN, CodecContract, identical, make_memories, noise


class TestTogether(CodecContract):
    trains = True
    worst = Distortion(keys=0.01, values=0.08)

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return ProductCodec(spec, bytes=12)


class TestByHead(CodecContract):
    trains = True
    worst = Distortion(keys=0.01, values=0.08)

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return ProductCodec(spec, bytes=12, together="head")


class TestUneven(CodecContract):
    trains = True
    worst = Distortion(keys=0.015, values=0.12)
    spec = UNEVEN

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return ProductCodec(spec, bytes=12)


class TestOfOneByte(CodecContract):
    trains = True
    worst = Distortion(keys=0.3, values=1.0)

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return ProductCodec(spec, bytes=1)


# -- where bytes go -----------------------------------------------------------------------------------------------

SPECTRA = st.lists(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), min_size=1, max_size=4).map(
    lambda units: [np.sort(np.array(unit))[::-1] for unit in units]
)


@given(SPECTRA, st.integers(0, 60))
def test_no_more_codes_are_given_than_there_are(spectra: list[np.ndarray], codes: int) -> None:
    widths = divide(spectra, codes)
    assert len(widths) == len(spectra)
    assert sum(map(len, widths)) <= codes
    for unit, spectrum in zip(widths, spectra, strict=True):
        assert set(unit) <= set(WIDTHS)
        assert sum(unit) <= len(spectrum)


@given(SPECTRA, st.integers(0, 60), st.floats(1e-3, 1e3))
def test_a_unit_of_greater_variance_gets_no_fewer_codes(spectra: list[np.ndarray], codes: int, by: float) -> None:
    less, more = divide([spectra[0], spectra[0] * max(by, 1 / by)], codes)
    assert len(less) <= len(more)


def test_codes_are_not_wasted() -> None:
    """Enough of them for all coordinates, or nearly all that there are."""
    spectrum = np.geomspace(1, 1e-6, 64)
    assert divide([spectrum], 200) == [[1] * 64]
    for codes in (4, 16, 32):
        assert 0.7 * codes <= sum(map(len, divide([spectrum, spectrum / 3], codes))) <= codes


def test_a_flat_spectrum_is_covered_evenly() -> None:
    [widths] = divide([np.ones(64)], 16)
    assert set(widths) <= {3, 4, 6}
    assert sum(widths) == 64 or len(widths) == 16


@pytest.mark.parametrize("seed", [0, 1])
def test_levels_are_nearly_the_best_there_are(seed: int) -> None:
    """A Gaussian's best 256 levels leave 2.72 / 256**2 of its variance (Panter and Dite); k-means left eight times."""
    random = np.random.default_rng(seed)
    levels = lloyd(random.standard_normal(20_000).astype(np.float32), 256)
    assert (np.diff(levels) >= 0).all()
    fresh = random.standard_normal(100_000)
    error = np.abs(fresh[:, None] - levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, fresh)][:, None])
    assert np.square(error).mean() < 1.4 * 2.72 / 256**2


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=30))
def test_a_few_values_are_levels_of_their_own(values: list[float]) -> None:
    levels = lloyd(np.array(values, np.float32), 256)
    assert levels.shape == (256,)
    assert set(levels) == set(np.array(values, np.float32))


# -- what it brings -----------------------------------------------------------------------------------------------


def weighed(codec: ProductCodec, memories: MemoryTensors, importance: Tensor) -> float:
    """What the errors of decoded memories cost."""
    back = codec.decode(codec.encode(memories), memories.tokens, torch.float32)
    cost = 0.0
    for row, own in enumerate(memories.tokens.tolist()):
        pair = [(a - b)[row, :, :, :own] for a, b in ((back.keys, memories.keys), (back.values, memories.values))]
        error = torch.cat(pair, 1).transpose(1, 2).flatten(2)  # [layers, tokens, 2 * heads * dim]
        cost += float(torch.einsum("lti,lij,ltj->", error, importance, error))
    return cost


@pytest.mark.parametrize("together", ["layer", "head"])
def test_importance_lowers_what_errors_cost(together: str) -> None:
    """Of layers, heads and channels, few matter; errors there are what importance makes small."""
    random = torch.Generator().manual_seed(5)
    root = (
        torch.randn(3, 64, 64, generator=random) * torch.logspace(0, -3, 64) * torch.tensor([5.0, 1, 0.1]).view(3, 1, 1)
    )
    importance = root @ root.transpose(1, 2)
    sample, fresh = make_memories([12] * 60, seed=1), make_memories([12, 7] * 4, seed=2)
    plain, aware = (ProductCodec(SPEC, bytes=8, together=together) for _ in range(2))
    plain.fit(sample)
    aware.fit(sample, importance)
    assert aware.weighs_errors
    assert weighed(aware, fresh, importance) < 0.7 * weighed(plain, fresh, importance)


def test_heads_share_what_they_have_in_common() -> None:
    """Heads and values that repeat each other take no bytes twice."""

    def repeated(count: int, seed: int) -> MemoryTensors:
        memories = make_memories([12] * count, seed=seed)
        memories.keys[:, :, 1] = memories.keys[:, :, 0] * 0.5
        memories.values[:, :, :] = memories.keys[:, :, :1] + 0.05 * memories.values
        return memories

    by_head, by_layer = (ProductCodec(SPEC, bytes=6, together=together) for together in ("head", "layer"))
    for codec in (by_head, by_layer):
        codec.fit(repeated(60, 1))
    fresh = repeated(8, 2)
    assert by_layer.distortion(fresh).values < 0.3 * by_head.distortion(fresh).values
    assert by_layer.distortion(fresh).keys < 0.3 * by_head.distortion(fresh).keys


def test_long_memories_decode_alike_in_any_batch() -> None:
    """Longer than one tile of rows, and of every length around its end."""
    spec = MemorySpec((0, 1), 3, 100, 24, 100, "float32")
    codec = ProductCodec(spec, bytes=17)
    codec.fit(make_memories([100, 64] * 5, spec=spec))
    memories = make_memories([100, 31, 32, 33, 1, 64, 65, 97], seed=3, spec=spec)
    payloads = codec.encode(memories)
    together = codec.decode(payloads, memories.tokens, torch.float32)
    for row, own in enumerate(memories.tokens.tolist()):
        alone = codec.decode(payloads[row : row + 1], memories.tokens[row : row + 1], torch.float32)
        assert torch.equal(alone.keys[0], together.keys[row, :, :, :own])
        assert torch.equal(alone.values[0], together.values[row, :, :, :own])


@pytest.mark.parametrize("together", ["layer", "head"])
def test_numba_and_torch_decode_alike(together: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    spec = MemorySpec((0, 1), 3, 100, 24, 100, "float32")
    codec = ProductCodec(spec, bytes=17, together=together)
    codec.fit(make_memories([100, 64] * 5, spec=spec))
    payloads, tokens = noise(3, codec.payload_bytes(70) + 5, 1)[:, 5:], torch.tensor([70, 3, 33])
    by_numba = codec.decode(payloads, tokens, torch.float32)
    monkeypatch.setattr(transform_quantiser, "compiled", lambda: False)
    assert identical(codec.decode(payloads, tokens, torch.float32), by_numba)


@given(seed=st.integers(0, 2**32))
def test_nothing_decodes_beyond_the_peak(seed: int) -> None:
    codec = _fitted()
    assert codec._state is not None
    decoded = codec.decode(noise(2, codec.payload_bytes(12), seed), torch.tensor([12, 12]), torch.float32)
    peak = codec._state.quantiser.peak * (1 + 1e-5)
    assert float(decoded.keys.abs().max()) <= peak
    assert float(decoded.values.abs().max()) <= peak


@cache
def _fitted() -> ProductCodec:
    codec = ProductCodec(SPEC, bytes=9)
    codec.fit(make_memories([12] * 30))
    return codec


# -- options and files --------------------------------------------------------------------------------------------


def test_a_vector_takes_so_many_bytes() -> None:
    codec = ProductCodec(MemorySpec(tuple(range(30)), 3, 128, 64, 128, "float32"))
    assert codec.options == {"bytes": 48, "together": "layer"}
    assert codec.payload_bytes(100) == 100 * 90 * 48
    small = _fitted()
    assert 0.9 * 9 * 6 <= small.payload_bytes(1) <= 9 * 6


@pytest.mark.parametrize("size", [0, 33, -1, True, 2.5, 8.0, "many"])
def test_bytes_that_cannot_be_are_refused(size: object) -> None:
    with pytest.raises(CodecError, match="whole number from 1 to 32, not"):
        ProductCodec(SPEC, bytes=size)  # type: ignore[arg-type]


def test_options_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(CodecError, match="one of layer, head, not 'model'"):
        ProductCodec(SPEC, together="model")
    with pytest.raises(CodecError, match="bytes of the product codec cannot be set together with key_bytes"):
        ProductCodec(SPEC, key_bytes=8, bytes=12)


@pytest.mark.parametrize("bad", [torch.zeros(3, 64, 63), torch.zeros(2, 64, 64), torch.full((3, 64, 64), torch.nan)])
def test_an_importance_of_another_shape_is_refused(bad: Tensor) -> None:
    with pytest.raises(CodecError, match=r"importance must be finite \[3, 64, 64\]"):
        ProductCodec(SPEC, bytes=9).fit(make_memories([12] * 4), bad)


def test_training_does_not_depend_on_threads() -> None:
    threads, prints = torch.get_num_threads(), set()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            codec = ProductCodec(SPEC, bytes=9)
            codec.fit(make_memories([12] * 30))
            prints.add((codec.fingerprint, codec.encode(make_memories([12, 7])).numpy().tobytes()))
    finally:
        torch.set_num_threads(threads)
    assert len(prints) == 1


def test_it_is_trained_on_very_little() -> None:
    codec = ProductCodec(SPEC, bytes=12)
    codec.fit(make_memories([1]))
    assert codec.measured is None
    codec.fit(make_memories([3, 2, 1]), torch.zeros(3, 64, 64))
    decoded = codec.decode(codec.encode(make_memories([12])), torch.tensor([12]), torch.float32)
    assert torch.isfinite(decoded.keys).all()


@pytest.mark.parametrize(
    "parts",
    [
        torch.tensor([[3, 0, 1]], dtype=torch.int32),  # no such unit
        torch.tensor([[0, 0, 5]], dtype=torch.int32),  # no such width
        torch.tensor([[0, 62, 4]], dtype=torch.int32),  # beyond the channels
        torch.tensor([[0, -1, 4]], dtype=torch.int32),
        torch.tensor([[0, 3, 1], [0, 2, 4]], dtype=torch.int32),  # one coordinate twice
        torch.tensor([[1, 0, 1], [0, 0, 1]], dtype=torch.int32),  # out of order
        torch.tensor([[0, 0, 1]] * 100, dtype=torch.int32),  # more than the bytes
        torch.tensor([[0, 0, 1]]),
        torch.zeros(3, dtype=torch.int32),
    ],
)
def test_parts_that_cannot_be_are_refused(parts: Tensor) -> None:
    state = _fitted()._state
    assert state is not None
    with pytest.raises(CodecError, match="'parts'"):
        TransformDesign(SPEC, bytes=9).restore({**state.quantiser.tensors(), "parts": parts})


def test_a_file_of_fewer_bytes_loads_and_takes_fewer(tmp_path: Path) -> None:
    codec = _fitted()
    codec.save(tmp_path / "codec")
    loaded = ProductCodec.load(tmp_path / "codec", SPEC)
    assert loaded.payload_bytes(5) == codec.payload_bytes(5)
    assert loaded.measured == codec.measured
    memories = make_memories([12, 5])
    payloads = codec.encode(memories)
    assert identical(
        loaded.decode(payloads, memories.tokens, torch.float32), codec.decode(payloads, memories.tokens, torch.float32)
    )
    names = set(safetensors.torch.load_file(tmp_path / "codec"))
    assert names == {"parts", "mean", "forward", "inverse", *(f"width{width}" for width in WIDTHS)}
