"""The laws of a tier's storage, of closing it, and of threads that share it."""

from random import Random
from threading import Event

import pytest

from m3runtime.errors import BlockError, TierClosedError, TierError
from m3runtime.memory.block import check
from m3runtime.storage.tier import CachingTier, Tier
from m3runtime.testing.blocks import LAST_ID, STAMP, make_blocks, make_ids, stored_bytes
from m3runtime.testing.threads import together
from m3runtime.testing.tier_laws import TierLaws, check_read, write


class StorageLaws(TierLaws):
    """One method sees what another does to the storage; a closed tier refuses; threads do not notice each other."""

    # Through the back door

    def test_what_is_written_lies_in_the_storage(self, tier: Tier) -> None:
        ids = make_ids(0, 3, 5, LAST_ID)
        write(tier, ids)
        for id, made in zip(ids.tolist(), make_blocks(ids), strict=True):
            raw = self.raw_read(tier, id)
            assert raw is not None
            assert raw.startswith(stored_bytes(made))
        assert self.raw_read(tier, 4) is None

    def test_what_lies_in_the_storage_is_found(self, tier: Tier) -> None:
        ids = make_ids(0, 3, 5, LAST_ID)
        for id, made in zip(ids.tolist(), make_blocks(ids), strict=True):
            self.raw_write(tier, id, stored_bytes(made))
        assert tier.contains(make_ids(0, 3, 4, 5, LAST_ID)).tolist() == [True, True, False, True, True]
        assert len(tier) == 4
        assert check_read(tier, make_ids(0, 3, 4, 5, LAST_ID)).tolist() == [True, True, False, True, True]
        tier.discard(make_ids(3))
        assert check_read(tier, ids).tolist() == [True, False, True, True]
        assert len(tier) == 3

    def test_what_is_discarded_leaves_the_storage(self, tier: Tier) -> None:
        write(tier, make_ids(0, 1, 2))
        tier.discard(make_ids(0, 2))
        assert self.raw_read(tier, 0) is self.raw_read(tier, 2) is None
        assert self.raw_read(tier, 1) is not None

    def test_a_block_cut_short_is_not_completed_by_what_the_row_held(self, tier: Tier) -> None:
        """A short read into a row that held the same block before would be right by accident."""
        if isinstance(tier, CachingTier) and not tier.can_rot:
            pytest.skip("what this tier holds cannot change")
        ids = make_ids(*range(1, 9))
        made = make_blocks(ids)
        for id, block in zip(ids.tolist(), made, strict=True):
            whole = stored_bytes(block)
            for end in (len(whole) - 1, len(whole) // 2, 40, 1, 0):
                self.raw_write(tier, id, whole[:end])
                out = block[None].clone()
                try:
                    found = tier.read(make_ids(id), out)
                except TierError:
                    continue
                if found[0]:
                    with pytest.raises(BlockError):
                        check(out[0].numpy(), id=id, stamp=STAMP)

    # Closing

    def test_closes_twice_and_then_refuses_everything(self, tier: Tier) -> None:
        ids = make_ids(1)
        write(tier, ids)
        calls = self.calls(tier, ids)
        for call in calls:
            call()
        tier.close()
        tier.close()
        for call in [*calls, *calls]:
            with pytest.raises(TierClosedError):
                call()
        tier.close()

    def test_is_a_context_manager(self, tier: Tier) -> None:
        with tier as same:
            assert same is tier
        with pytest.raises(TierClosedError):
            len(tier)

    # Threads

    def test_threads_get_their_own_bytes(self, tier: Tier) -> None:
        def work(number: int) -> None:
            random = Random(number)
            for turn in range(20):
                ids = make_ids(*(random.randrange(12) for _ in range(random.randrange(1, 6))))
                if turn % 3 == 0:
                    write(tier, ids)
                check_read(tier, ids)

        write(tier, make_ids(*range(12)))
        together(6, work)
        assert check_read(tier, make_ids(*range(12))).all()

    def test_closing_while_others_use_it(self, tier: Tier) -> None:
        """Every call ends as it should or in `TierClosedError`, and after closing in nothing else."""
        ids = make_ids(*range(8))
        write(tier, ids)
        closed = Event()

        def work(number: int) -> None:
            random, calls = Random(number), self.calls(tier, ids)
            if number == 0:
                try:
                    for _ in range(12):
                        check_read(tier, ids)
                    tier.close()
                finally:
                    closed.set()
                return
            while True:
                late = closed.is_set()
                try:
                    random.choice(calls)()
                except TierClosedError:
                    return
                assert not late, "a closed tier did not refuse a call"

        together(5, work)
