import pytest
import torch

from m3backends.slabs import GpuTier, PinnedTier
from m3runtime.device.resolve import resolve
from m3runtime.errors import ConfigError
from m3runtime.storage.tier import CachingTier
from m3runtime.testing.blocks import SLOT_BYTES, make_blocks, make_ids, same_block
from m3runtime.testing.slab import SlabTierContract
from m3runtime.testing.tier import check_read, write


class TestPinnedTier(SlabTierContract):
    def make(self, *, slot_bytes: int, capacity: int) -> CachingTier:
        return PinnedTier(slot_bytes=slot_bytes, capacity=capacity)


class TestGpuTierOnCpu(SlabTierContract):
    def make(self, *, slot_bytes: int, capacity: int) -> CachingTier:
        return GpuTier(slot_bytes=slot_bytes, capacity=capacity, device=torch.device("cpu"))


@pytest.mark.gpu
class TestGpuTier(SlabTierContract):
    def make(self, *, slot_bytes: int, capacity: int) -> CachingTier:
        return GpuTier(slot_bytes=slot_bytes, capacity=capacity, device=resolve("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("source", ["cpu", "cuda"])
@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", [GpuTier, PinnedTier])
def test_copies_between_devices(kind: type[CachingTier], source: str, target: str) -> None:
    ids = make_ids(1, 2, 3, 4)
    made = make_blocks(ids)
    with kind(slot_bytes=SLOT_BYTES, capacity=8 * SLOT_BYTES, device=resolve("cuda")) as tier:  # type: ignore[call-arg]
        tier.write(ids[[0, 1, 3]], made[[0, 1, 3]].to(source))
        out = torch.zeros((4, SLOT_BYTES), dtype=torch.uint8, device=target)
        assert tier.read(ids, out).tolist() == [True, True, False, True]
        assert all(same_block(out[row], made[row]) for row in (0, 1, 3))
        assert not out[2].any()


def test_lru_evicts_what_was_read_longest_ago() -> None:
    with PinnedTier(slot_bytes=SLOT_BYTES, capacity=3 * SLOT_BYTES) as tier:
        write(tier, make_ids(1, 2, 3))
        check_read(tier, make_ids(1))
        assert 2 in tier  # asking does not count as a use
        write(tier, make_ids(4))
        assert tier.contains(make_ids(1, 2, 3, 4)).tolist() == [True, False, True, True]


def test_made_in_inference_mode_it_works_outside() -> None:
    with torch.inference_mode():
        tier = PinnedTier(slot_bytes=SLOT_BYTES, capacity=2 * SLOT_BYTES)
    write(tier, make_ids(1))
    with torch.inference_mode():
        write(tier, make_ids(2))
        assert check_read(tier, make_ids(1, 2)).all()
    assert check_read(tier, make_ids(1, 2)).all()
    tier.close()


def test_more_than_the_machine_has_is_one_clear_line() -> None:
    with pytest.raises(ConfigError, match=r"tier pinned: no .* bytes on cpu") as caught:
        PinnedTier(slot_bytes=1 << 20, capacity=1 << 58)
    assert "\n" not in str(caught.value)


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="lru"):
        PinnedTier(slot_bytes=SLOT_BYTES, capacity=SLOT_BYTES, eviction="newest")
