"""Laws of the limit of what a trained codec may lose."""

import pytest
import torch

from m3runtime.codecs.limit import MOST, ErrorLimit, held_out, relative_errors
from m3runtime.codecs.product.codec import ProductCodec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.testing.codec_laws import SPEC, make_memories


def with_noise(memories: MemoryTensors, share: float) -> MemoryTensors:
    noise = torch.Generator().manual_seed(1)
    keys, values = (x + share * torch.randn(x.shape, generator=noise) for x in (memories.keys, memories.values))
    return MemoryTensors(keys, values, memories.tokens)


def test_errors_are_relative_and_of_a_memorys_own_tokens() -> None:
    memories = make_memories([12, 3, 7])
    twice = MemoryTensors(2 * memories.keys, memories.values, memories.tokens)
    errors = relative_errors(memories, twice)
    assert errors.shape == (3, 2 * len(SPEC.layers))
    torch.testing.assert_close(errors[:, : len(SPEC.layers)], torch.ones(3, len(SPEC.layers), dtype=torch.float64))
    assert not errors[:, len(SPEC.layers) :].any()
    alone = relative_errors(memories.rows(slice(1, 2)), twice.rows(slice(1, 2)))
    assert torch.equal(alone[0], errors[1])


def test_what_loses_more_than_is_typical_exceeds_it() -> None:
    memories = make_memories([12, 3, 7, 12])
    limit = ErrorLimit.of(relative_errors(memories, with_noise(memories, 0.1)))
    assert limit.exceeded(memories, with_noise(memories, 0.1)) == []
    assert limit.exceeded(memories, with_noise(memories, 0.1 * (1.4 * MOST) ** 0.5)) == [0, 1, 2, 3]
    assert limit.exceeded(memories, memories) == []


def test_one_layer_that_is_better_does_not_hide_the_others() -> None:
    limit = ErrorLimit([0.1] * 6)
    assert limit.ratios(torch.tensor([[0.1] * 6, [0.4] * 6, [0.05] + [0.4] * 5])).tolist() == pytest.approx(
        [1, 4, 4 * 0.125 ** (1 / 6)]
    )


def test_no_error_at_all_is_a_number() -> None:
    limit = ErrorLimit([0.0] * 6)
    assert limit.ratios(torch.zeros(1, 6, dtype=torch.float64)).tolist() == [1.0]
    assert limit.ratios(torch.ones(1, 6, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize(("count", "kept"), [(1, 0), (2, 1), (7, 1), (8, 1), (16, 2), (100, 12)])
def test_a_part_of_a_sample_is_held_out(count: int, kept: int) -> None:
    assert held_out(count) == kept


def test_a_codec_keeps_its_limit_on_memories_like_its_own_and_exceeds_it_on_others() -> None:
    pytest.importorskip("faiss")
    codec = ProductCodec(SPEC)
    sample = make_memories([12] * 160, seed=1)
    axes = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(3)))[0]
    squeezed = torch.logspace(0, -2, 16)

    def alike(memories: MemoryTensors) -> MemoryTensors:
        return MemoryTensors(memories.keys * squeezed @ axes, memories.values * squeezed @ axes, memories.tokens)

    codec.fit(alike(sample))

    def errors(memories: MemoryTensors) -> torch.Tensor:
        return relative_errors(memories, codec.decode(codec.encode(memories), memories.tokens, torch.float32))

    limit = ErrorLimit.of(errors(alike(sample).rows(slice(0, 140))))
    like, unlike = (limit.ratios(errors(x)) for x in (alike(make_memories([12] * 8)), make_memories([12] * 8)))
    assert (like < MOST).all()
    assert (unlike > MOST).all()
