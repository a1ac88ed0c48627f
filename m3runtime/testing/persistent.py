"""`PersistentTierContract`: the laws of a caching tier whose blocks outlive the process."""

from abc import abstractmethod

import numpy as np

from m3runtime.storage.abilities import Persistent
from m3runtime.storage.tier import CachingTier, Tier
from m3runtime.testing.blocks import LAST_ID, SLOT_BYTES, make_blocks, make_ids, stored_bytes
from m3runtime.testing.caching import CachingTierContract
from m3runtime.testing.tier import check_read, write

EVERYTHING = make_ids(*range(40), LAST_ID)


class PersistentTierContract(CachingTierContract):
    """`CachingTierContract` for a tier that is `Persistent`: say also how it is opened again."""

    outlives = True

    @abstractmethod
    def reopen(self, tier: CachingTier, *, capacity: int) -> CachingTier:
        """Another tier over the storage of ``tier``, as the next process opens it, with this capacity.

        ``tier`` may be closed, or left open as by a process that was killed; no call is running.
        """

    def held(self, tier: Tier) -> set[int]:
        """The ids that the tier holds, after its methods were found to agree on them."""
        assert isinstance(tier, Persistent)
        ids = tier.ids()
        assert ids.dtype == np.uint64
        assert len(set(ids.tolist())) == len(ids) == len(tier)
        assert set(EVERYTHING[check_read(tier, EVERYTHING)].tolist()) == set(ids.tolist())
        assert set(EVERYTHING[tier.contains(EVERYTHING)].tolist()) == set(ids.tolist())
        return set(ids.tolist())

    def test_lists_what_it_holds(self, small: CachingTier) -> None:
        assert self.held(small) == set()
        write(small, make_ids(LAST_ID, 0))
        assert self.held(small) == {0, LAST_ID}
        write(small, make_ids(1, 2, 3, 4))
        assert len(self.held(small)) == 3
        small.discard(EVERYTHING)
        assert self.held(small) == set()

    def test_what_is_held_outlives_closing(self, small: CachingTier) -> None:
        write(small, make_ids(LAST_ID, 0, 3))
        small.close()
        for _ in range(2):
            with self.reopen(small, capacity=3 * SLOT_BYTES) as again:
                assert self.held(again) == {LAST_ID, 0, 3}

    def test_what_is_in_the_storage_is_there_for_the_next(self, small: CachingTier) -> None:
        for id, made in zip((7, LAST_ID), make_blocks(make_ids(7, LAST_ID)), strict=True):
            self.raw_write(small, id, stored_bytes(made))
        small.close()
        with self.reopen(small, capacity=3 * SLOT_BYTES) as again:
            assert self.held(again) == {7, LAST_ID}

    def test_what_was_evicted_or_discarded_stays_away(self, small: CachingTier) -> None:
        write(small, make_ids(*range(10)))
        kept = self.held(small)
        small.discard(make_ids(min(kept)))
        small.close()
        with self.reopen(small, capacity=3 * SLOT_BYTES) as again:
            assert self.held(again) == kept - {min(kept)}

    def test_no_byte_of_what_was_discarded_is_in_a_file(self, tier: CachingTier) -> None:
        gone, kept = make_ids(1, 3, 6), make_ids(2, 4, 5)
        write(tier, make_ids(1, 2, 3, 4))
        write(tier, make_ids(5, 6))
        tier.discard(gone)
        tier.close()
        files = b"".join(file.read_bytes() for file in self.folder.rglob("*") if file.is_file())
        for block in map(stored_bytes, make_blocks(gone)):
            assert not any(block[at : at + 8] in files for at in range(48, len(block) - 7, 4))
        with self.reopen(tier, capacity=16 * SLOT_BYTES) as again:
            assert self.held(again) == set(kept.tolist())

    def test_a_process_that_was_killed_leaves_right_bytes_or_none(self, small: CachingTier) -> None:
        write(small, make_ids(1, 2, 3))
        write(small, make_ids(4, 5))
        before = self.held(small)
        with self.reopen(small, capacity=3 * SLOT_BYTES) as again:
            assert self.held(again) <= before

    def test_less_room_than_before(self, tier: CachingTier) -> None:
        write(tier, make_ids(*range(16)))
        tier.close()
        with self.reopen(tier, capacity=3 * SLOT_BYTES - 1) as again:
            kept = self.held(again)
            assert len(kept) <= 2
            assert {id for id in range(40) if self.raw_read(again, id) is not None} == self.held(again)

    def test_a_life_of_many_processes(self, tier: CachingTier) -> None:
        random, held, killed = np.random.default_rng(0), set[int](), list[CachingTier]()
        for turn in range(12):
            assert self.held(tier) <= held
            write(tier, random.integers(0, 40, 9).astype(np.uint64))
            tier.discard(random.integers(0, 40, 3).astype(np.uint64))
            held = self.held(tier)
            if turn % 2:
                tier.close()
            killed.append(tier)
            tier = self.reopen(tier, capacity=16 * SLOT_BYTES)
            assert turn % 2 == 0 or self.held(tier) == held
        for each in (tier, *killed):
            each.close()
