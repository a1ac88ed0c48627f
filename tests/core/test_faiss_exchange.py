"""Codes exchanged with faiss, byte for byte, and quantisers with it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.errors import CodecError, InputError
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.testing.codec import SPEC, make_memories
from tests.forked import run

faiss = pytest.importorskip("faiss")

from m3runtime.codecs.product.faiss_exchange import from_faiss, to_faiss  # noqa: E402 - it imports faiss

SMALL = ["PQ4x8", "PQ4x10", "OPQ4_16,PQ8x8", "Residual2x8,PQ4x8", "OPQ4_16,Residual2x8,PQ4x9", "RR16,Residual1x9,PQ2x8"]


def vectors(count: int, dim: int, seed: int) -> Any:
    """Correlated Gaussian ``float32[count, dim]``."""
    random = np.random.default_rng(seed)
    mixing = np.random.default_rng(dim).standard_normal((dim, dim)) * np.linspace(1, 0.05, dim)
    return (random.standard_normal((count, dim)) @ mixing).astype(np.float32)


def settle(quantiser: Any, iterations: int) -> None:
    quantiser.cp.niter = iterations
    quantiser.cp.min_points_per_centroid = 1


def without_polysemy(index: Any) -> None:
    """Its training takes ten seconds, and changes nothing but the order of centroids."""
    if hasattr(index, "do_polysemous_training"):
        index.do_polysemous_training = False


def trained(factory: str, dim: int = 16, count: int = 2000, iterations: int = 3, seed: int = 0) -> Any:
    """An index of faiss, trained by faiss."""
    index = faiss.index_factory(dim, factory)
    inner = index
    if isinstance(index, faiss.IndexPreTransform):
        turn = faiss.downcast_VectorTransform(index.chain.at(0))
        if isinstance(turn, faiss.OPQMatrix):
            turn.niter, quantiser = 3, faiss.ProductQuantizer(dim, turn.M, 8)
            settle(quantiser, 2)
            turn.pq = quantiser
        inner = faiss.downcast_index(index.index)
    without_polysemy(inner)
    settle(inner.pq, iterations)
    if isinstance(inner, faiss.Index2Layer):
        coarse = faiss.downcast_index(inner.q1.quantizer)
        settle(coarse.pq, iterations)
    index.train(vectors(count, dim, seed))
    return index


def memories_of(x: Any, spec: MemorySpec) -> MemoryTensors:
    """One memory, whose keys and values are these vectors and these times 2."""
    keys = torch.from_numpy(x).view(1, len(spec.layers), spec.kv_heads, spec.tokens, spec.head_dim)
    return MemoryTensors(keys, 2 * keys, torch.tensor([spec.tokens]))


def split(codec: ProductCodec, payloads: Any, key_size: int) -> tuple[Any, Any]:
    """The codes of keys and values of one payload, ``uint8[heads * tokens, bytes]`` as in `memories_of`."""
    heads, tokens = codec.spec.vectors_per_token, codec.spec.tokens
    of_tokens = payloads[0].view(tokens, -1)
    keys, values = of_tokens[:, : heads * key_size], of_tokens[:, heads * key_size :]
    return tuple(x.view(tokens, heads, -1).transpose(0, 1).reshape(heads * tokens, -1).numpy() for x in (keys, values))


def same_codes(index: Any, x: Any, codes: Any) -> bool:
    """Equal to those of faiss, but for a few that are as near as float32 can tell: faiss' own depend on the CPU there.

    Centroids nearly coincide where the vectors that trained them were few.
    """
    theirs = index.sa_encode(x)
    rows = (codes != theirs).any(1)
    one, other = (
        np.square(index.sa_decode(some[rows]).astype(np.float64) - x[rows]).sum(1) for some in (codes, theirs)
    )
    return bool(rows.mean() < 0.02 and (np.abs(one - other) <= 1e-6 * np.square(x[rows]).sum(1)).all())


def exchange(index: Any, spec: MemorySpec, source: Any) -> ProductCodec:
    """All that must be the same of an index and the codec made of it."""
    codec = from_faiss(spec, source, source)
    x = vectors(spec.vectors_per_token * spec.tokens, spec.head_dim, seed=9)
    memories = memories_of(x, spec)
    payloads = codec.encode(memories)
    keys, values = split(codec, payloads, index.sa_code_size())
    assert same_codes(index, x, keys)
    assert same_codes(index, 2 * x, values)
    # Codes of ours, decoded by both; and codes that nobody encoded.
    for some in (payloads, torch.randint(0, 256, payloads.shape, dtype=torch.uint8)):
        if some is not payloads and index_refuses(index, some, codec):
            continue
        decoded = codec.decode(some, memories.tokens, torch.float32)
        keys, values = split(codec, some, index.sa_code_size())
        for ours, codes in ((decoded.keys, keys), (decoded.values, values)):
            there = index.sa_decode(np.ascontiguousarray(codes))
            torch.testing.assert_close(ours.reshape(there.shape), torch.from_numpy(there), rtol=1e-5, atol=1e-5)
    # Back again.
    for part in ("keys", "values"):
        again = to_faiss(codec, part)
        assert again.sa_code_size() == index.sa_code_size()
        assert np.array_equal(again.sa_encode(x), index.sa_encode(x))
        assert np.array_equal(again.sa_decode(index.sa_encode(x)), index.sa_decode(index.sa_encode(x)))
    return codec


def index_refuses(index: Any, payloads: Any, codec: ProductCodec) -> bool:
    """faiss ends the process at a list number above the greatest; ours ignores the bits that are too many."""
    inner = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
    return isinstance(inner, faiss.Index2Layer) and inner.q1.nlist != 1 << 8 * inner.code_size_1


@pytest.mark.parametrize("factory", SMALL)
def test_codes_are_those_of_faiss(factory: str, tmp_path: Path) -> None:
    index = trained(factory)
    path = tmp_path / "index"
    faiss.write_index(index, str(path))
    codec = exchange(index, SPEC, path)
    assert codec.fingerprint == from_faiss(SPEC, index, index).fingerprint
    codec.save(tmp_path / "codec")
    loaded = ProductCodec.load(tmp_path / "codec", SPEC)
    memories = memories_of(vectors(72, 16, 3), SPEC)
    assert torch.equal(loaded.encode(memories), codec.encode(memories))
    faiss.write_index(to_faiss(loaded, "keys"), str(path))
    assert from_faiss(SPEC, path, path).fingerprint == codec.fingerprint


def test_the_quantiser_of_the_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faiss.cvar, "distance_compute_blas_threshold", 20)  # trains in a fraction of the time
    spec = MemorySpec(tuple(range(4)), 8, 8, 80, 128, "float32")
    index = trained("OPQ20_80,Residual2x14,PQ8x10", dim=80, count=17_000, iterations=1)
    codec = exchange(index, spec, index)
    assert codec.options == ProductCodec(spec, preset="memory3").options
    assert codec.payload_bytes(1) == 32 * 28


def test_keys_and_values_may_be_of_different_indexes() -> None:
    keys, values = trained("PQ8x8"), trained("OPQ4_16,Residual2x8,PQ4x8", seed=1)
    codec = from_faiss(SPEC, keys, values)
    assert (codec.options["keys"], codec.options["values"]) == ("8x8", "2x8+4x8")
    x = vectors(72, 16, 5)
    of_keys, of_values = split(codec, codec.encode(memories_of(x, SPEC)), 8)
    assert same_codes(keys, x, of_keys)
    assert same_codes(values, 2 * x, of_values)


@pytest.mark.parametrize("rotation", ["none", "pca", "opq"])
def test_what_was_trained_here_is_exported(rotation: str, tmp_path: Path) -> None:
    codec = ProductCodec(SPEC, keys="2x8+4x9", values="4x8", scope="model", rotation=rotation, offset=False)
    codec.fit(make_memories([12] * 20))
    x = vectors(72, 16, 6)
    memories = memories_of(x, SPEC)
    payloads = codec.encode(memories)
    decoded = codec.decode(payloads, memories.tokens, torch.float32)
    of_both = (("keys", "values"), split(codec, payloads, 7), (decoded.keys, decoded.values))
    for part, codes, ours in zip(*of_both, strict=True):
        path = tmp_path / part
        faiss.write_index(to_faiss(codec, part), str(path))
        index = faiss.read_index(str(path))
        assert same_codes(index, x if part == "keys" else 2 * x, codes)
        there = torch.from_numpy(index.sa_decode(np.ascontiguousarray(codes)))
        torch.testing.assert_close(ours.reshape(there.shape), there, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("Flat", "a IndexFlat.* is neither an IndexPQ nor an Index2Layer"),
        ("PQ4x6", "levels 4x6 must have 8 to 16 bits each"),
        ("IVF4,PQ4x8", "a IndexIVFPQ is neither"),
        ("PCA16,PQ4x8", "its PCAMatrix from 16 to 16 channels is no rotation"),
        ("OPQ4_8,PQ4x8", "its OPQMatrix from 16 to 8 channels is no rotation"),
        ("L2norm,PQ4x8", "vectors go through NormalizationTransform, not through one rotation"),
        ("RR16,RR16,PQ4x8", "vectors go through RandomRotationMatrix, RandomRotationMatrix, not"),
        ("Residual256,PQ4x8", "its first level is a IndexFlat.*, not a MultiIndexQuantizer"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_other_indexes_are_refused(factory: str, message: str) -> None:
    index = faiss.index_factory(16, factory)
    without_polysemy(faiss.downcast_index(getattr(index, "index", index)))
    index.train(vectors(1000, 16, 0))
    with pytest.raises(CodecError, match=f"the index for keys: {message}"):
        from_faiss(SPEC, index, index)


def test_what_cannot_be_imported_says_why(tmp_path: Path) -> None:
    index, path = trained("PQ4x8"), tmp_path / "index"
    with pytest.raises(InputError, match="index: there is no such file"):
        from_faiss(SPEC, path, path)
    path.write_bytes(b"no index at all")
    with pytest.raises(InputError, match="index: not an index of faiss"):
        from_faiss(SPEC, path, path)
    with pytest.raises(CodecError, match="the index for values: it is not trained"):
        from_faiss(SPEC, index, faiss.index_factory(16, "PQ4x8"))
    with pytest.raises(CodecError, match="have 16 channels, not 64"):
        from_faiss(MemorySpec((0,), 1, 4, 64, 4, "float32"), index, index)
    skewed = trained("RR16,PQ4x8")
    turn = faiss.downcast_VectorTransform(skewed.chain.at(0))
    faiss.copy_array_to_vector(2 * faiss.vector_to_array(turn.A), turn.A)
    with pytest.raises(CodecError, match="its RandomRotationMatrix is not orthogonal"):
        from_faiss(SPEC, skewed, skewed)


def test_what_cannot_be_exported_says_why() -> None:
    codec = ProductCodec(SPEC, 8, 4)
    with pytest.raises(CodecError, match="not trained"):
        to_faiss(codec, "keys")
    codec.fit(make_memories([12] * 8))
    with pytest.raises(CodecError, match="of scope model without offset and of two levels at most"):
        to_faiss(codec, "keys")
    with pytest.raises(CodecError, match="has keys and values, not 'queries'"):
        to_faiss(codec, "queries")


@pytest.mark.parametrize("factory", ["OPQ4_16,PQ8x8", "Residual2x10,PQ4x9", "OPQ4_16,Residual2x8,PQ4x9"])
def test_many_codes_are_those_of_faiss_but_where_it_rounds(factory: str) -> None:
    """Of 40,000 vectors."""
    index = trained(factory)
    spec = MemorySpec(tuple(range(10)), 8, 500, 16, 500, "float32")
    x = vectors(40_000, 16, seed=11)
    codec = from_faiss(spec, index, index)
    ours, _ = split(codec, codec.encode(memories_of(x, spec)), index.sa_code_size())
    assert (ours != index.sa_encode(x)).any(1).mean() < 1e-3
    assert same_codes(index, x, ours)


def test_centroids_that_exist_twice_are_encoded_as_faiss_does() -> None:
    index = faiss.IndexPQ(16, 4, 9)
    once = np.repeat(vectors(4, 16, 0).reshape(4, 4, 4), 128, 1)  # [parts, centroids, 4], each 128 times
    faiss.copy_array_to_vector(once.ravel(), index.pq.centroids)
    index.is_trained = True
    exchange(index, SPEC, index)


def test_encoding_and_decoding_need_no_faiss(tmp_path: Path) -> None:
    """In a process where it is not installed."""
    index = trained("OPQ4_16,Residual2x8,PQ4x9")
    memories = memories_of(vectors(72, 16, 3), SPEC)
    codec = from_faiss(SPEC, index, index)
    codec.save(tmp_path / "codec")
    torch.save((memories.keys, memories.values, memories.tokens), tmp_path / "memories")
    torch.save(codec.encode(memories), tmp_path / "payloads")
    use = f"""
import pathlib, sys, torch
sys.modules["faiss"] = None
from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.testing.codec import SPEC

folder = pathlib.Path({str(tmp_path)!r})
codec = ProductCodec.load(folder / "codec", SPEC)
memories = MemoryTensors(*torch.load(folder / "memories"))
payloads = codec.encode(memories)
print(torch.equal(payloads, torch.load(folder / "payloads")), codec.distortion(memories).keys < 0.05)
"""
    assert run(use).stdout == "True True\n"


def test_codes_that_are_exchanged_do_not_mind_what_was_imported_first() -> None:
    """usearch's library and faiss' share names: `faiss.index_factory` crashes in a process that took usearch first."""
    use = """
import usearch.index
from m3runtime.codecs.product.faiss_exchange import to_faiss
from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.testing.codec import SPEC, make_memories

codec = ProductCodec(SPEC, keys="1x8+4x8", values="4x8", rotation="none", scope="model", offset=False)
codec.fit(make_memories([12] * 40))
codec.encode(make_memories([3]))
print(type(to_faiss(codec, "keys")).__name__, type(to_faiss(codec, "values")).__name__)
"""
    done = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True, check=False)
    assert done.stdout == "Index2Layer IndexPQ\n", done.stderr[-300:]
