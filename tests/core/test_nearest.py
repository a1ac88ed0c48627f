"""The nearest centroids: numba finds those that numpy finds, and both the nearest."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3runtime.codecs.kernels import nearest
from m3runtime.codecs.product.codec import ProductCodec, transform_quantiser
from m3runtime.testing.codec import SPEC, make_memories


@settings(deadline=None)  # the first of each size compiles
@given(
    size=st.sampled_from([1, 2, 3, 4, 8]),
    parts=st.integers(1, 20),
    groups=st.integers(1, 3),
    sharing=st.integers(1, 2),
    tokens=st.sampled_from([1, 7, 128, 129, 300]),
    bits=st.sampled_from([2, 8, 9]),
    coarse=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_numba_and_numpy_find_the_same(
    size: int, parts: int, groups: int, sharing: int, tokens: int, bits: int, coarse: bool, seed: int
) -> None:
    pytest.importorskip("numba")
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(groups * sharing, tokens, parts * size, generator=random)
    centroids = torch.randn(groups, parts, 2**bits, size, generator=random)
    if coarse:  # many are equally near
        x, centroids = x.round(), centroids.round()
    against = nearest.scorer(centroids)
    one, other = torch.zeros(2, tokens, len(x), parts, dtype=torch.int32)
    nearest.nearest(x, against, sharing, one)
    nearest.by_numpy(x.numpy(), against.numpy(), sharing, other.numpy())
    assert torch.equal(one, other)
    head = len(x) - 1
    cut = x[head].view(tokens, parts, size)
    apart = (cut[:, :, None] - centroids[head // sharing]).double().square().sum(3)  # [tokens, parts, centroids]
    chosen = apart.gather(2, one[:, head, :, None].long())[..., 0]
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
