"""`TierContract`: the laws of every tier."""

import numpy as np
import pytest
import torch

from m3runtime.errors import InputError
from m3runtime.storage.tier import Tier
from m3runtime.testing.blocks import LAST_ID, SLOT_BYTES, make_blocks, make_ids, same_block
from m3runtime.testing.threads import together
from m3runtime.testing.tier_laws import UNKNOWN, check_read, read, write
from m3runtime.testing.tier_storage import StorageLaws

__all__ = ["UNKNOWN", "TierContract", "check_read", "read", "together", "write"]


class TierContract(StorageLaws):
    """The laws of every tier. Use `CachingTierContract` or `HomeContract`, which say how to make one.

    Its themes: reading and writing (here), and `StorageLaws`.
    """

    # Writing and reading

    def test_is_empty_at_first(self, tier: Tier) -> None:
        assert len(tier) == 0
        assert tier.slot_bytes == SLOT_BYTES
        assert tier.name
        assert 5 not in tier
        assert not check_read(tier, make_ids(0, 5, LAST_ID)).any()

    def test_reads_what_was_written(self, tier: Tier) -> None:
        ids = make_ids(0, 3, 7, LAST_ID)
        write(tier, ids)
        assert len(tier) == 4
        assert tier.contains(ids).all()
        assert 0 in tier
        assert LAST_ID in tier
        assert check_read(tier, ids).all()
        assert check_read(tier, ids[::-1].copy()).all()

    def test_hits_and_misses_in_one_batch(self, tier: Tier) -> None:
        write(tier, make_ids(2, 4, 6))
        ids = make_ids(1, 2, 3, 4, 4, 5, 6)
        expected = [False, True, False, True, True, False, True]
        assert check_read(tier, ids).tolist() == expected
        assert tier.contains(ids).tolist() == expected

    def test_reads_into_rows_of_a_larger_slab(self, tier: Tier) -> None:
        write(tier, make_ids(8, 9))
        slab = torch.zeros((6, SLOT_BYTES), dtype=torch.uint8)
        assert tier.read(make_ids(8, 9), slab[2:4]).all()
        assert same_block(slab[3], make_blocks(make_ids(9))[0])
        assert not slab[:2].any()
        assert not slab[4:].any()

    def test_rows_may_lie_apart(self, tier: Tier) -> None:
        ids = make_ids(8, 9, 10)
        made = make_blocks(ids)
        wide = torch.zeros((6, SLOT_BYTES + 24), dtype=torch.uint8)
        rows = wide[::2, 5 : 5 + SLOT_BYTES]
        rows.copy_(made)
        tier.write(ids, rows)
        assert check_read(tier, ids).all()
        wide.zero_()
        assert tier.read(make_ids(10, UNKNOWN, 8), rows).tolist() == [True, False, True]
        assert same_block(rows[0], made[2])
        assert same_block(rows[2], made[0])
        assert not wide[1:4].any()
        assert not wide[:, :5].any()
        assert not wide[:, 5 + SLOT_BYTES :].any()

    def test_keeps_its_own_copy(self, tier: Tier) -> None:
        ids = make_ids(1, 2)
        blocks = make_blocks(ids)
        tier.write(ids, blocks)
        blocks.zero_()
        found, out = read(tier, ids)
        out.zero_()
        assert found.all()
        assert check_read(tier, ids).all()

    def test_discards(self, tier: Tier) -> None:
        write(tier, make_ids(1, 2, 3))
        tier.discard(make_ids(2, 2, UNKNOWN, 3))
        assert check_read(tier, make_ids(1, 2, 3)).tolist() == [True, False, False]
        assert len(tier) == 1
        assert 2 not in tier
        tier.discard(make_ids(2, 3))
        assert len(tier) == 1

    def test_never_gives_another_id_s_bytes(self, tier: Tier) -> None:
        ids, random = make_ids(*range(16)), np.random.default_rng(0)
        made = make_blocks(ids)
        tier.write(ids, made)
        for _ in range(40):
            wanted = random.integers(0, 20, 400)
            found = check_read(tier, wanted.astype(np.uint64), made[np.minimum(wanted, 15)])
            assert np.array_equal(found, wanted < 16)

    # Batches

    def test_empty_batches(self, tier: Tier) -> None:
        write(tier, make_ids(1))
        none = make_ids()
        write(tier, none)
        tier.discard(none)
        assert check_read(tier, none).tolist() == []
        assert tier.contains(none).tolist() == []
        assert len(tier) == 1

    def test_an_id_twice_in_a_batch_is_held_once(self, tier: Tier) -> None:
        write(tier, make_ids(5, 5, 6, 5))
        assert len(tier) == 2
        assert check_read(tier, make_ids(5, 6, 5)).all()
        assert tier.contains(make_ids(5, 7, 5)).tolist() == [True, False, True]
        tier.discard(make_ids(5, 5))
        assert len(tier) == 1

    def test_thousands_of_ids_in_a_batch(self, tier: Tier) -> None:
        ids = make_ids(*range(3000))
        made = make_blocks(ids)
        tier.write(ids, made)
        found = check_read(tier, ids, made)
        assert found.sum() == len(tier) >= 16
        assert np.array_equal(tier.contains(ids), found)
        tier.discard(ids[:2990])
        assert np.array_equal(check_read(tier, ids, made), found & (ids >= 2990))

    # What is held stays as it is

    def test_writing_again_changes_nothing(self, tier: Tier) -> None:
        write(tier, make_ids(5))
        write(tier, make_ids(5, 6))
        write(tier, make_ids(6, 5))
        assert len(tier) == 2
        assert check_read(tier, make_ids(5, 6)).all()

    def test_a_block_that_is_held_is_not_overwritten(self, tier: Tier) -> None:
        write(tier, make_ids(5))
        tier.write(make_ids(5), make_blocks(make_ids(5), edition=1))
        assert len(tier) == 1
        assert check_read(tier, make_ids(5)).all()

    @pytest.mark.parametrize("fault", ["width", "count", "type of rows", "type of ids", "shape of ids"])
    def test_rows_or_ids_that_do_not_fit_are_refused(self, tier: Tier, fault: str) -> None:
        write(tier, make_ids(1, 2))
        ids, rows = make_ids(1, 2), torch.full((2, SLOT_BYTES), 0xEE, dtype=torch.uint8)
        match fault:
            case "width":
                rows = torch.full((2, SLOT_BYTES + 1), 0xEE, dtype=torch.uint8)
            case "count":
                rows = rows[:1]
            case "type of rows":
                rows = rows.to(torch.int16)
            case "type of ids":
                ids = ids.astype(np.int64)
            case "shape of ids":
                ids = ids[None]
        with pytest.raises(InputError):
            tier.read(ids, rows)
        assert bool((rows == 0xEE).all())
        with pytest.raises(InputError):
            tier.write(ids, rows)
        assert check_read(tier, make_ids(1, 2)).all()
