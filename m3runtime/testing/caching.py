"""`CachingTierContract`: the laws of a bounded tier above the home."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from random import Random

import numpy as np
import pytest

from m3runtime.memory.block import Ids
from m3runtime.storage.abilities import Persistent
from m3runtime.storage.tier import CachingTier, Tier
from m3runtime.testing.blocks import SLOT_BYTES, make_ids
from m3runtime.testing.threads import together
from m3runtime.testing.tier import UNKNOWN, TierContract, check_read, write


class CachingTierContract(TierContract):
    """Subclass it as ``TestMyTier``, say how to make the tier, and open its back door: see `TierContract`.

    A tier that is `Persistent` takes `PersistentTierContract`, one that is a `SlabTier` takes `SlabTierContract`.
    """

    outlives: bool = False
    """Is the tier to be `Persistent`?"""

    @abstractmethod
    def make(self, *, slot_bytes: int, capacity: int) -> CachingTier:
        """A new, empty tier with room for ``capacity`` bytes of blocks. What keeps files keeps them in `folder`."""

    @pytest.fixture
    def tier(self) -> Iterator[Tier]:
        """A new tier with room for 16 blocks; see `TierContract.tier`."""
        with self.make(slot_bytes=SLOT_BYTES, capacity=16 * SLOT_BYTES) as tier:
            yield tier

    @pytest.fixture
    def small(self) -> Iterator[CachingTier]:
        """Room for three blocks, and for three quarters of another."""
        with self.make(slot_bytes=SLOT_BYTES, capacity=3 * SLOT_BYTES + 192) as tier:
            yield tier

    def calls(self, tier: Tier, ids: Ids) -> Sequence[Callable[[], object]]:
        """Every method once; see `TierContract.calls`."""
        assert isinstance(tier, CachingTier)
        calls = [*super().calls(tier, ids)]
        if type(tier).score is not CachingTier.score:  # which does nothing
            calls.append(lambda: tier.score(ids, np.zeros(len(ids), np.float32)))
        if isinstance(tier, Persistent):
            calls.append(tier.ids)
        return calls

    def test_what_outlives_the_process_is_tested_for_it(self, small: CachingTier) -> None:
        assert isinstance(small, Persistent) == self.outlives, "a tier with `ids` takes PersistentTierContract"

    # Capacity

    def test_capacity_is_exact(self, small: CachingTier) -> None:
        assert small.capacity is not None
        assert 3 * SLOT_BYTES <= small.capacity <= 3 * SLOT_BYTES + 192
        for id in range(10):
            write(small, make_ids(id))
            assert len(small) == min(id + 1, 3)
            assert check_read(small, make_ids(id)).all()
        assert check_read(small, make_ids(*range(10))).sum() == 3

    def test_what_makes_room_leaves_the_storage(self, small: CachingTier) -> None:
        for id in range(10):
            write(small, make_ids(id))
            held = small.contains(make_ids(*range(10)))
            assert [self.raw_read(small, id) is not None for id in range(10)] == held.tolist()

    def test_a_batch_larger_than_the_tier(self, small: CachingTier) -> None:
        write(small, make_ids(*range(10)))
        assert len(small) == 3
        assert check_read(small, make_ids(*range(10))).sum() == 3
        write(small, make_ids(*range(1000), *range(1000)))
        assert len(small) == 3
        assert check_read(small, make_ids(*range(1000))).sum() == 3

    @pytest.mark.parametrize("capacity", [0, SLOT_BYTES - 1])
    def test_no_room_for_any(self, capacity: int) -> None:
        with self.make(slot_bytes=SLOT_BYTES, capacity=capacity) as tier:
            write(tier, make_ids(1, 2))
            assert len(tier) == 0
            assert not check_read(tier, make_ids(1, 2)).any()
            tier.discard(make_ids(1))

    def test_room_for_one(self) -> None:
        with self.make(slot_bytes=SLOT_BYTES, capacity=SLOT_BYTES) as tier:
            write(tier, make_ids(1, 2))
            write(tier, make_ids(3))
            assert check_read(tier, make_ids(1, 2, 3)).tolist() == [False, False, True]

    @pytest.mark.parametrize("slot_bytes", [64, 65, 4097])
    def test_slots_of_any_size(self, slot_bytes: int) -> None:
        with self.make(slot_bytes=slot_bytes, capacity=5 * slot_bytes - 1) as tier:
            write(tier, make_ids(*range(7)))
            assert len(tier) == 4
            assert check_read(tier, make_ids(*range(7))).sum() == 4

    def test_scores_change_nothing_that_is_held(self, small: CachingTier) -> None:
        write(small, make_ids(1, 2, 3))
        small.score(make_ids(3, UNKNOWN, 3, 1), np.array([1, 0.5, -1, 0], np.float32))
        small.score(make_ids(), np.zeros(0, np.float32))
        assert check_read(small, make_ids(1, 2, 3)).all()
        assert UNKNOWN not in small
        for id in range(10, 20):
            small.score(make_ids(id - 1), np.array([0.9], np.float32))
            write(small, make_ids(id))
            assert id in small
            assert len(small) == 3

    def test_a_long_random_life(self) -> None:
        """Found blocks are right, and held blocks make room for new ones."""
        random = Random(0)
        everything = make_ids(*range(24))
        with self.make(slot_bytes=SLOT_BYTES, capacity=6 * SLOT_BYTES) as tier:
            for _ in range(600):
                ids = [random.randrange(24) for _ in range(random.randrange(6))]
                batch = make_ids(*ids)
                held = set(everything[tier.contains(everything)].tolist())
                match random.randrange(5):
                    case 0 | 1:
                        write(tier, batch)
                        assert len(ids) != 1 or ids[0] in tier
                    case 2 | 3:
                        assert check_read(tier, batch).tolist() == [id in held for id in ids]
                    case _:
                        tier.discard(batch[:1])
                        assert not tier.contains(batch[:1]).any()
                now = tier.contains(everything)
                assert now.sum() == len(tier) <= 6
            assert check_read(tier, everything).sum() == len(tier)

    # Threads

    def test_threads_with_evictions_between(self, small: CachingTier) -> None:
        """Never another id's bytes, never too many."""

        def work(number: int) -> None:
            random = Random(number)
            for turn in range(40):
                ids = make_ids(*(random.randrange(8) for _ in range(random.randrange(1, 6))))
                write(small, ids)
                check_read(small, ids)
                assert len(small) <= 3
                if turn % 5 == number % 5:
                    small.discard(ids[:1])

        together(6, work)
