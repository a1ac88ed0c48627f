"""The nearest centroids: numba finds those that torch finds, and both the nearest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3runtime.codecs.product import transform_quantiser
from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.codecs.product.kernels import nearest
from m3runtime.codecs.product.residual import Level
from m3runtime.testing.codec import SPEC, make_memories


@settings(deadline=None)  # the first of each size compiles
@given(
    size=st.sampled_from([1, 2, 3, 4, 8]),
    parts=st.integers(1, 20),
    groups=st.integers(1, 3),
    tokens=st.sampled_from([1, 7, 128, 129, 300]),
    bits=st.sampled_from([2, 8, 9]),
    coarse=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_numba_and_torch_find_the_same(
    size: int, parts: int, groups: int, tokens: int, bits: int, coarse: bool, seed: int
) -> None:
    pytest.importorskip("numba")
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(groups, tokens, parts * size, generator=random)
    centroids = torch.randn(groups * parts, 2**bits, size, generator=random)
    if coarse:  # many are equally near
        x, centroids = x.round(), centroids.round()
    places = Level(parts, 8).places(groups, parts * size)
    one, other = torch.zeros(2, tokens, groups * parts, dtype=torch.int32)
    nearest.by_numba(x, places, nearest.scorer(centroids), one)
    nearest.by_torch(x, places, nearest.scorer(centroids), other)
    assert torch.equal(one, other)
    cut = x.view(groups, tokens, parts, size).permute(1, 0, 2, 3).flatten(1, 2)
    apart = (cut[:, :, None] - centroids).double().square().sum(3)  # [tokens, groups * parts, centroids]
    chosen = apart.gather(2, one[:, :, None].long())[..., 0]
    torch.testing.assert_close(chosen, apart.amin(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_centroids_the_first_is_found(dtype: torch.dtype) -> None:
    """Training on few vectors leaves some twice; more tokens and centroids than are scored at once."""
    random = torch.Generator().manual_seed(0)
    centroids = torch.randn(2, 3000, 10, generator=random, dtype=dtype).repeat(1, 3, 1)
    x = torch.randn(1, 700, 20, generator=random, dtype=dtype)
    found = torch.zeros(700, 2, dtype=torch.int32)
    nearest.nearest(x, Level(2, 14).places(1, 20), nearest.scorer(centroids), found)
    apart = torch.stack([torch.cdist(x[0, :, at : at + 10], centroids[at // 10]) for at in (0, 10)], 1)
    assert int(found.max()) < 3000
    chosen = apart.gather(2, found[:, :, None].long())[..., 0]
    torch.testing.assert_close(chosen, apart.amin(2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("together", ["layer", "head"])
def test_encoding_is_the_same_with_and_without_numba(together: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    codec = ProductCodec(SPEC, bytes=13, together=together)
    codec.fit(make_memories([12] * 40))
    memories = make_memories([12, 5, 1], seed=7)
    with_it = codec.encode(memories)
    for module in (nearest, transform_quantiser):
        monkeypatch.setattr(module, "compiled", lambda: False)
    assert torch.equal(codec.encode(memories), with_it)
