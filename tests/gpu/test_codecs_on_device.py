"""Codecs on CUDA against the CPU: the same bytes where all is computed exactly, the same values to rounding."""

from collections.abc import Callable

import pytest
import torch

from m3runtime.codecs import Codec
from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.codecs.raw import RawCodec
from m3runtime.codecs.scalar import ScalarCodec
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.testing.codec import make_memories

pytestmark = pytest.mark.gpu

SPEC = MemorySpec(tuple(range(4)), 2, 40, 80, 40, "float32")
PAPER = {"keys": "2x9+8x10", "values": "2x9+8x10", "rotation": "opq", "scope": "model", "offset": False}
EXACT: dict[str, Callable[[], Codec]] = {
    "raw": lambda: RawCodec(SPEC),
    "bfloat16": lambda: RawCodec(SPEC, "bfloat16"),
    "scalar": lambda: ScalarCodec(SPEC),
    "4 bits": lambda: ScalarCodec(SPEC, 4),
    "the paper's": lambda: ProductCodec(SPEC, **PAPER),
}
ROUNDED: dict[str, Callable[[], Codec]] = {
    "product": lambda: ProductCodec(SPEC),
    "product by head": lambda: ProductCodec(SPEC, together="head"),
    "residual": lambda: ProductCodec(SPEC, keys="8x8+4x9", values="16x8"),
}
RELATIVE = 1e-6
"""The most that a decoded value may differ, of the largest one: sums are added up in another order."""


def fitted(make: Callable[[], Codec]) -> Codec:
    codec = make()
    codec.fit(make_memories([40] * 12, seed=1, spec=SPEC))
    return codec


def on_cuda(memories: MemoryTensors) -> MemoryTensors:
    return MemoryTensors(memories.keys.cuda(), memories.values.cuda(), memories.tokens)


@pytest.mark.parametrize("name", EXACT)
def test_the_device_encodes_to_the_same_bytes(name: str) -> None:
    codec, memories = fitted(EXACT[name]), make_memories([40, 3, 33], seed=2, spec=SPEC)
    assert torch.equal(codec.encode(on_cuda(memories)), codec.encode(memories))


@pytest.mark.parametrize("name", ROUNDED)
def test_the_device_encodes_to_nearly_the_same_bytes(name: str) -> None:
    """Between centroids as near as float32 rounds either may be chosen: the same each time, and no worse."""
    codec, memories = fitted(ROUNDED[name]), make_memories([40, 3, 33], seed=2, spec=SPEC)
    there = codec.encode(on_cuda(memories))
    assert torch.equal(there, codec.encode(on_cuda(memories)))
    assert float((there != codec.encode(memories)).float().mean()) < 1e-3
    ours, theirs = codec.distortion(memories), codec.distortion(on_cuda(memories))
    assert theirs.keys == pytest.approx(ours.keys, rel=1e-3)
    assert theirs.values == pytest.approx(ours.values, rel=1e-3)


@pytest.mark.parametrize("name", [*EXACT, *ROUNDED])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_device_decodes_to_the_same_values(name: str, dtype: torch.dtype) -> None:
    codec, memories = fitted((EXACT | ROUNDED)[name]), make_memories([40, 3, 33], seed=2, spec=SPEC)
    payloads = codec.encode(memories)
    here, there = (codec.decode(some, memories.tokens, dtype) for some in (payloads, payloads.cuda()))
    most = RELATIVE if dtype == torch.float32 else torch.finfo(dtype).eps
    for a, b in ((here.keys, there.keys), (here.values, there.values)):
        assert b.is_cuda
        assert float((a.float() - b.cpu().float()).abs().max()) <= most * float(a.abs().max())
