import pytest
import torch

from m3backends.slabs import PinnedTier
from m3runtime.errors import TierError
from m3runtime.storage.eviction import LruPolicy
from m3runtime.testing.blocks import SLOT_BYTES, make_ids
from m3runtime.testing.tier import check_read, write

NOWHERE = torch.device("meta")  # it holds no bytes: what a device that fails gives


@pytest.fixture
def tier() -> PinnedTier:
    return PinnedTier(slot_bytes=SLOT_BYTES, capacity=4 * SLOT_BYTES)


def test_blocks_that_cannot_be_copied_are_a_fault_and_not_held(tier: PinnedTier) -> None:
    write(tier, make_ids(1))
    with pytest.raises(TierError, match="tier pinned"):
        tier.write(make_ids(2, 3), torch.empty((2, SLOT_BYTES), dtype=torch.uint8, device=NOWHERE))
    assert check_read(tier, make_ids(1, 2, 3)).tolist() == [True, False, False]
    write(tier, make_ids(2, 3, 4))
    assert check_read(tier, make_ids(1, 2, 3, 4)).all()


def test_rows_that_cannot_be_filled_are_a_fault(tier: PinnedTier) -> None:
    write(tier, make_ids(1))
    with pytest.raises(TierError, match="tier pinned"):
        tier.read(make_ids(1), torch.empty((1, SLOT_BYTES), dtype=torch.uint8, device=NOWHERE))
    assert check_read(tier, make_ids(1)).all()


def test_what_an_interrupted_write_left_unfilled_is_not_held(tier: PinnedTier) -> None:
    class Interrupted(LruPolicy):
        def admitted(self, id: int) -> None:
            super().admitted(id)
            if id == 3:
                raise KeyboardInterrupt

    tier._policy = Interrupted(4)
    write(tier, make_ids(1))
    with pytest.raises(KeyboardInterrupt):
        write(tier, make_ids(2, 3, 4))
    assert check_read(tier, make_ids(1, 2, 3, 4)).tolist() == [True, False, False, False]
    write(tier, make_ids(5, 6, 7))
    assert check_read(tier, make_ids(1, 5, 6, 7)).all()
