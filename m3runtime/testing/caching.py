"""`CachingTierContract`: the laws of a bounded tier above the home."""

# ruff: noqa: ARG002 - a test's name says what it shows; fixtures are asked for by name

from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from m3runtime.errors import TierClosedError
from m3runtime.testing.blocks import SLOT_BYTES, make_ids
from m3runtime.testing.tier import TierContract, check_read, together, write
from m3runtime.tier import CachingTier, Tier


class CachingTierContract(TierContract):
    """Subclass it as ``TestMyTier`` and say how to make the tier."""

    @abstractmethod
    def make(self, *, slot_bytes: int, capacity: int) -> CachingTier:
        """A new tier with room for ``capacity`` bytes of blocks."""

    @pytest.fixture
    def tier(self, tmp_path: Path) -> Iterator[Tier]:
        """See `TierContract.tier`."""
        with self.make(slot_bytes=SLOT_BYTES, capacity=16 * SLOT_BYTES) as tier:
            yield tier

    @pytest.fixture
    def small(self) -> Iterator[CachingTier]:
        """Room for three blocks, and for three quarters of another."""
        tier = self.make(slot_bytes=SLOT_BYTES, capacity=3 * SLOT_BYTES + 192)
        yield tier
        tier.close()

    def test_capacity_is_exact(self, small: CachingTier) -> None:
        assert small.capacity is not None
        assert 3 * SLOT_BYTES <= small.capacity <= 3 * SLOT_BYTES + 192
        for id in range(10):
            write(small, make_ids(id))
            assert len(small) == min(id + 1, 3)
            assert check_read(small, make_ids(id)).all()
        assert check_read(small, make_ids(*range(10))).sum() == 3

    def test_a_batch_larger_than_the_tier(self, small: CachingTier) -> None:
        write(small, make_ids(*range(10)))
        assert len(small) == 3
        assert check_read(small, make_ids(*range(10))).sum() == 3

    @pytest.mark.parametrize("capacity", [0, SLOT_BYTES - 1])
    def test_no_room_for_any(self, capacity: int) -> None:
        with self.make(slot_bytes=SLOT_BYTES, capacity=capacity) as tier:
            write(tier, make_ids(1, 2))
            assert len(tier) == 0
            assert not check_read(tier, make_ids(1, 2)).any()

    def test_room_for_one(self) -> None:
        with self.make(slot_bytes=SLOT_BYTES, capacity=SLOT_BYTES) as tier:
            write(tier, make_ids(1, 2))
            write(tier, make_ids(3))
            assert check_read(tier, make_ids(1, 2, 3)).tolist() == [False, False, True]

    def test_pinned_blocks_stay(self, small: CachingTier) -> None:
        write(small, make_ids(1, 2, 3))
        assert small.pin(make_ids(1, 3, 9)).tolist() == [True, True, False]
        for id in range(10, 20):
            write(small, make_ids(id))
            assert check_read(small, make_ids(1, 3, id)).all()
            assert len(small) == 3

    def test_nothing_is_admitted_where_all_is_pinned(self, small: CachingTier) -> None:
        write(small, make_ids(1, 2, 3))
        small.pin(make_ids(1, 2, 3))
        write(small, make_ids(4, 1, 5))
        assert check_read(small, make_ids(1, 2, 3, 4, 5)).tolist() == [True, True, True, False, False]
        small.unpin(make_ids(2))
        write(small, make_ids(4))
        assert check_read(small, make_ids(1, 2, 3, 4)).tolist() == [True, False, True, True]

    def test_pins_count(self, small: CachingTier) -> None:
        write(small, make_ids(1, 2, 3))
        small.pin(make_ids(1, 1))
        small.pin(make_ids(1, 2, 3))
        small.unpin(make_ids(1, 1, 2, 3))
        write(small, make_ids(10, 11, 12))
        assert 1 in small
        small.unpin(make_ids(1, 1, 99))  # one more than there are
        small.pin(make_ids(11))
        write(small, make_ids(20, 21))
        assert small.contains(make_ids(1, 11)).tolist() == [False, True]

    def test_a_miss_is_not_pinned_later(self, small: CachingTier) -> None:
        assert not small.pin(make_ids(1)).any()
        write(small, make_ids(1, 2, 3))
        small.pin(make_ids(2, 3))
        write(small, make_ids(4))
        assert 1 not in small

    def test_discard_takes_pinned_blocks_and_their_pins(self, small: CachingTier) -> None:
        write(small, make_ids(1, 2, 3))
        small.pin(make_ids(1, 1))
        small.discard(make_ids(1))
        assert 1 not in small
        write(small, make_ids(1))
        small.pin(make_ids(2, 3))
        write(small, make_ids(4))
        assert 1 not in small

    def test_pinning_a_closed_tier(self, small: CachingTier) -> None:
        small.close()
        with pytest.raises(TierClosedError):
            small.pin(make_ids(1))
        with pytest.raises(TierClosedError):
            small.unpin(make_ids(1))

    def test_threads_with_evictions_between(self, small: CachingTier) -> None:
        """Never another id's bytes, never too many, and what a thread has pinned stays."""

        def work(number: int) -> None:
            random = Random(number)
            for turn in range(60):
                ids = make_ids(*(random.randrange(8) for _ in range(random.randrange(1, 6))))
                write(small, ids)
                check_read(small, ids)
                assert len(small) <= 3
                if turn % 5 == number % 5:
                    small.discard(ids[:1])

        together(6, work)

    def test_threads_that_pin(self, small: CachingTier) -> None:
        def work(number: int) -> None:
            random = Random(number)
            for _ in range(60):
                ids = make_ids(random.randrange(8))
                write(small, ids)
                if small.pin(ids)[0]:
                    write(small, make_ids(*(random.randrange(8) for _ in range(4))))
                    assert check_read(small, ids).all()
                    small.unpin(ids)

        together(6, work)
        for id in (20, 21, 22):  # no pin is left over
            write(small, make_ids(id))
            assert small.pin(make_ids(id)).all()
