"""The three codecs against the contract, and what each promises beyond it."""

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
import xxhash

from m3runtime.codecs.base import Codec, Distortion
from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.codecs.raw import RawCodec
from m3runtime.codecs.scalar import ScalarCodec
from m3runtime.errors import CodecError
from m3runtime.memory.spec import DTYPES, MemorySpec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.testing.codec import SPEC, UNEVEN, CodecContract, identical, make_memories
from tests.forked import run


class TestRaw(CodecContract):
    worst = Distortion(keys=0.0, values=0.0)

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return RawCodec(spec)


class TestRawHalf(CodecContract):
    worst = Distortion(keys=1e-6, values=1e-6)

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return RawCodec(spec, dtype="float16")


class TestRawBfloat16(CodecContract):
    worst = Distortion(keys=2e-5, values=2e-5)

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return RawCodec(spec, dtype="bfloat16")


class TestScalar8(CodecContract):
    worst = Distortion(keys=5e-6, values=5e-5)

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return ScalarCodec(spec)


class TestScalar4(CodecContract):
    worst = Distortion(keys=1e-3, values=5e-3)

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return ScalarCodec(spec, bits=4)


class TestScalarMixed(CodecContract):
    worst = Distortion(keys=5e-6, values=5e-3)

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return ScalarCodec(spec, key_bits=8, value_bits=4)


class TestProduct(CodecContract):
    trains = True
    worst = Distortion(keys=4e-3, values=0.15)

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return ProductCodec(spec, key_bytes=8, value_bytes=4)


class TestProductByLayer(CodecContract):
    trains = True
    worst = Distortion(keys=4e-3, values=0.03)

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return ProductCodec(spec, key_bytes=8, value_bytes=8, scope="layer")


class TestProductOfOneByte(CodecContract):
    trains = True
    worst = Distortion(keys=0.2, values=0.9)

    @classmethod
    def make(cls, spec: MemorySpec) -> Codec:
        return ProductCodec(spec, key_bytes=2, value_bytes=1)


class TestRawUneven(TestRaw):
    spec = UNEVEN


class TestScalarMixedUneven(TestScalarMixed):
    spec = UNEVEN


class TestProductUneven(TestProduct):
    spec = UNEVEN
    worst = Distortion(keys=6e-3, values=0.2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_raw_loses_nothing(dtype: str) -> None:
    spec = MemorySpec((0, 1), 2, 12, 8, 16, dtype)
    memories = make_memories([12, 12], spec=spec)
    codec = RawCodec(spec)
    assert identical(codec.decode(codec.encode(memories), memories.tokens, getattr(torch, dtype)), memories)


def test_raw_refuses_what_its_dtype_cannot_hold() -> None:
    memories = make_memories([12])
    memories.keys[0, 0, 0, 0, 0] = 1e5
    with pytest.raises(CodecError, match="too large for float16"):
        RawCodec(SPEC, "float16").encode(memories)
    with pytest.raises(CodecError, match="float8"):
        RawCodec(SPEC, "float8")


@pytest.mark.parametrize("out", [torch.float16, torch.bfloat16])
def test_raw_clamps_what_the_result_cannot_hold(out: torch.dtype) -> None:
    most = torch.finfo(torch.float32).max
    memories = MemoryTensors(torch.full((1, 3, 2, 1, 16), most), torch.full((1, 3, 2, 1, 16), -most), torch.tensor([1]))
    codec = RawCodec(SPEC)
    decoded = codec.decode(codec.encode(memories), memories.tokens, out)
    assert torch.equal(decoded.keys, torch.full_like(decoded.keys, torch.finfo(out).max))
    assert torch.equal(decoded.values, torch.full_like(decoded.values, -torch.finfo(out).max))


@pytest.mark.parametrize("bits", [4, 8])
def test_scalar_errs_by_half_a_step_at_most(bits: int) -> None:
    memories = make_memories([12], seed=5)
    codec = ScalarCodec(SPEC, bits)
    decoded = codec.decode(codec.encode(memories), memories.tokens, torch.float32)
    for true, back in ((memories.keys, decoded.keys), (memories.values, decoded.values)):
        step = (true.amax(3, keepdim=True) - true.amin(3, keepdim=True)) / (2**bits - 1)
        assert ((true - back).abs() <= 0.51 * step + 4e-3 * 2**-bits * true.abs() + 1e-6).all()


def test_scalar_keeps_a_channel_that_does_not_vary() -> None:
    constant = torch.tensor([0.0, 1.0, -2.5, 1e-7, 65504.0, -65504.0, 0.1, -0.1]).repeat(2)
    memories = MemoryTensors(constant.expand(1, 3, 2, 4, 16), -constant.expand(1, 3, 2, 4, 16), torch.tensor([4]))
    codec = ScalarCodec(SPEC, 4)
    decoded = codec.decode(codec.encode(memories), memories.tokens, torch.float32)
    torch.testing.assert_close(decoded.keys, memories.keys, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(decoded.values, memories.values, rtol=1e-3, atol=1e-7)


def test_scalar_packs_an_odd_number_of_channels() -> None:
    spec = MemorySpec((0,), 1, 4, 5, 4, "float32")
    memories = make_memories([4, 4], spec=spec)
    codec = ScalarCodec(spec, 4)
    assert codec.payload_bytes(4) - codec.payload_bytes(3) == 2 * 3
    assert codec.distortion(memories).values < 0.01


def test_scalar_refuses_what_a_range_cannot_hold() -> None:
    memories = make_memories([12])
    memories.values[0, 0, 0, 0, 0] = -1e5
    with pytest.raises(CodecError, match="too large"):
        ScalarCodec(SPEC).encode(memories)
    with pytest.raises(CodecError, match="4 or 8, not 5"):
        ScalarCodec(SPEC, value_bits=5)


def test_the_size_of_a_product_payload() -> None:
    codec = ProductCodec(MemorySpec(tuple(range(30)), 3, 128, 64, 128, "float32"), key_bytes=32, value_bytes=16)
    assert codec.payload_bytes(100) == 90 * 64 + 100 * 90 * (32 + 16)


@pytest.mark.parametrize(("key_bytes", "value_bytes"), [(5, 4), (8, 32), (0, 4), (8, -1)])
def test_product_names_the_sizes_it_allows(key_bytes: int, value_bytes: int) -> None:
    with pytest.raises(CodecError, match="_bytes must divide head_dim 16: one of 1, 2, 4, 8, 16, not"):
        ProductCodec(SPEC, key_bytes, value_bytes)
    with pytest.raises(CodecError, match="one of head, layer, model, not 'token'"):
        ProductCodec(SPEC, 8, 4, scope="token")


def test_product_takes_the_offset_of_keys_off() -> None:
    """Memories whose keys lie far apart, and are alike but for that; those held out lie beyond the others."""
    memories = make_memories([12] * 40, seed=4)
    memories.keys.add_(torch.arange(-20, 20).view(40, 1, 1, 1, 1), alpha=10)
    codec = ProductCodec(SPEC, key_bytes=8, value_bytes=4)
    codec.fit(memories)
    assert codec.measured is not None
    assert codec.measured.keys < 1e-3


def test_product_reports_progress_and_what_it_measured(tmp_path: Path) -> None:
    seen: list[float] = []
    codec = ProductCodec(SPEC, key_bytes=8, value_bytes=4)
    assert codec.measured is None
    sample = make_memories([12] * 32)
    codec.fit(sample, progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    rest = MemoryTensors(sample.keys[28:], sample.values[28:], sample.tokens[28:])
    assert codec.measured == codec.distortion(rest)
    codec.save(tmp_path / "codec")
    assert ProductCodec.load(tmp_path / "codec", SPEC).measured == codec.measured


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_product_is_trained_on_very_little(scope: str) -> None:
    codec = ProductCodec(SPEC, key_bytes=8, value_bytes=4, scope=scope)
    with pytest.raises(CodecError, match="no memories"):
        codec.fit(make_memories([]))
    memory = make_memories([1])
    codec.fit(memory)
    assert codec.measured is None
    assert codec.distortion(memory).values < 1e-6
    codec.fit(make_memories([12, 2, 7], seed=3))
    assert codec.measured is not None
    assert codec.distortion(make_memories([12])).values < 1


def test_product_training_does_not_depend_on_threads_and_leaves_faiss_as_it_was() -> None:
    faiss = pytest.importorskip("faiss")
    before, threads = faiss.cvar.distance_compute_blas_threshold, torch.get_num_threads()
    prints = set()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            codec = ProductCodec(SPEC, key_bytes=8, value_bytes=4)
            codec.fit(make_memories([12] * 24))
            prints.add((codec.fingerprint, codec.encode(make_memories([12, 7])).numpy().tobytes()))
    finally:
        torch.set_num_threads(threads)
    assert len(prints) == 1
    assert faiss.cvar.distance_compute_blas_threshold == before


def test_a_failed_fit_leaves_the_codec_as_it_was() -> None:
    def stop(_: float) -> None:
        raise KeyboardInterrupt

    codec = ProductCodec(SPEC, key_bytes=8, value_bytes=4)
    with pytest.raises(KeyboardInterrupt):
        codec.fit(make_memories([12] * 24), progress=stop)
    assert not codec.trained


def test_a_trained_product_codec_needs_no_faiss(tmp_path: Path) -> None:
    codec = ProductCodec(SPEC, key_bytes=8, value_bytes=4)
    codec.fit(make_memories([12] * 24))
    codec.save(tmp_path / "codec")
    program = f"""
import sys, pathlib
sys.modules["faiss"] = None  # as if it were not installed
from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.errors import PluginError
from m3runtime.testing.codec import SPEC, make_memories
codec = ProductCodec.load(pathlib.Path({str(tmp_path / "codec")!r}), SPEC)
memories = make_memories([12, 3])
assert codec.distortion(memories).keys < 0.01
try:
    codec.fit(memories)
except PluginError as error:
    print(error)
"""
    assert run(program).stdout.strip() == "training the product codec needs faiss: pip install 'm3runtime[train]'"


def test_fingerprints_tell_codecs_apart() -> None:
    codecs = [
        RawCodec(SPEC),
        RawCodec(SPEC, "float16"),
        RawCodec(MemorySpec((0, 2, 4), 2, 12, 16, 12, "float32")),
        ScalarCodec(SPEC, 4),
        ScalarCodec(SPEC, 8),
        ScalarCodec(SPEC, 8, value_bits=4),
    ]
    assert len({codec.fingerprint for codec in codecs}) == len(codecs)
    assert ScalarCodec(SPEC, 4, key_bits=8, value_bits=8).fingerprint == ScalarCodec(SPEC).fingerprint


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    RawCodec(SPEC).save(tmp_path / "codec")
    with pytest.raises(CodecError, match="kind 'raw', not 'scalar'"):
        ScalarCodec.load(tmp_path / "codec", SPEC)


def test_a_file_that_was_forged_is_refused(tmp_path: Path) -> None:
    """Right in its digest and wrong in what it holds, as a careless writer of our format would make it."""
    path = tmp_path / "codec"
    codec = ProductCodec(SPEC, key_bytes=8, value_bytes=4)
    codec.fit(make_memories([12] * 24))
    codec.save(path)
    good = path.read_bytes()
    size = int.from_bytes(good[:8], "little")
    text = json.loads(good[8 : 8 + size])["__metadata__"]["m3runtime"]

    def forge(tensors: dict[str, torch.Tensor], old: str = "", new: str = "") -> None:
        assert old in text
        blank = text.replace(json.loads(text)["digest"], "0" * 32).replace(old, new)
        data = safetensors.torch.save(tensors, {"m3runtime": blank})
        path.write_bytes(
            data.replace(b'digest\\":\\"' + b"0" * 32, f'digest\\":\\"{xxhash.xxh3_128_hexdigest(data)}'.encode())
        )

    tensors = safetensors.torch.load(good)
    forge(tensors)
    assert ProductCodec.load(path, SPEC).fingerprint == codec.fingerprint
    forge(tensors, '"format":1', '"format":2')
    with pytest.raises(CodecError, match="format version 2, this release reads 1"):
        ProductCodec.load(path, SPEC)
    forge(tensors, '"keys":"8x8"', '"keys":"4x8"')
    with pytest.raises(CodecError, match=r"'keys\.0' is"):
        ProductCodec.load(path, SPEC)
    forge(tensors, '"keys":"8x8"', '"keys":"5x8"')
    with pytest.raises(CodecError, match="must divide"):
        ProductCodec.load(path, SPEC)
    forge(tensors, '"keys":"8x8"', '"colour":5')
    with pytest.raises(CodecError, match="do not fit"):
        ProductCodec.load(path, SPEC)
    forge({name: tensor for name, tensor in tensors.items() if name != "offset"})
    with pytest.raises(CodecError, match="not those that it states"):
        ProductCodec.load(path, SPEC)
    for value, message in (
        (torch.nan, r"'keys\.0' is not finite"),
        (torch.inf, r"'keys\.0' is not finite"),
        (3.4e38, "too large"),
    ):
        forge({**tensors, "keys.0": torch.full_like(tensors["keys.0"], value)})
        with pytest.raises(CodecError, match=message):
            ProductCodec.load(path, SPEC)
