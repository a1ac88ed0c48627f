import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import run_state_machine_as_test
from torch import Tensor

from m3backends.lmdb.home import LmdbHome
from m3backends.slabs import GpuTier, PinnedTier
from m3runtime.device.resolve import resolve
from m3runtime.errors import InputError, TierClosedError, TierError
from m3runtime.memory.block import BlockStamp, Found, Ids, length
from m3runtime.observe.counts import TierStats
from m3runtime.storage.eviction import POLICIES
from m3runtime.storage.hierarchy import LIFT_BLOCKS, Hierarchy
from m3runtime.storage.home import Home
from m3runtime.storage.slab import SlabTier
from m3runtime.storage.tier import CachingTier
from m3runtime.testing.blocks import SLOT_BYTES, STAMP, make_batch, make_blocks, make_ids, same_block
from m3runtime.testing.faulty import Fault, FaultyHome, FaultyTier, Kind, Schedule
from m3runtime.testing.hierarchy import HierarchyMachine
from m3runtime.testing.threads import together


def gpu(slots: int, policy: str = "lru", slot: int = SLOT_BYTES) -> GpuTier:
    return GpuTier(slot_bytes=slot, capacity=slots * slot, eviction=policy, device=torch.device("cpu"))


def pinned(slots: int, policy: str = "lru", slot: int = SLOT_BYTES) -> PinnedTier:
    return PinnedTier(slot_bytes=slot, capacity=slots * slot, eviction=policy)


class Machine(HierarchyMachine):
    slots: tuple[int, ...] = ()
    policy = "lru"
    slot = SLOT_BYTES

    def make_tiers(self) -> Sequence[CachingTier]:
        return [(gpu, pinned)[place % 2](slots, self.policy, self.slot) for place, slots in enumerate(self.slots)]

    def open_home(self, folder: Path) -> Home:
        return LmdbHome(path=folder, slot_bytes=SLOT_BYTES)

    def corrupt(self, home: Home, id: int) -> bool:
        assert isinstance(home, LmdbHome)
        with home._environment.env.begin(write=True, db=home._db.blocks) as txn:
            key = id.to_bytes(8, "big")
            stored = txn.get(key)
            assert stored is not None
            return txn.put(key, stored[:60] + bytes([stored[60] ^ 1]) + stored[61:])  # within the digest


class LastingTier(SlabTier):
    """Its blocks outlive the process: a tier takes over ``held`` and leaves there what it had when it was closed."""

    def __init__(self, held: dict[int, Tensor]) -> None:
        super().__init__(
            name="lasting", slot_bytes=SLOT_BYTES, capacity=5 * SLOT_BYTES, eviction="lru", device=torch.device("cpu")
        )
        self.drive = held
        for id, block in held.items():
            self.write(make_ids(id), block[None])

    def ids(self) -> Ids:
        with self._lock:
            self._open()
            return np.array(list(self._held), np.uint64)

    def close(self) -> None:
        with self._lock:
            if self._slab is not None:
                self.drive.clear()
                self.drive.update({id: self._slab[slot].clone() for id, slot in self._held.items()})
        super().close()


class NoTier(Machine):
    pass


class OneTier(Machine):
    slots = (3,)


class TwoTiers(Machine):
    slots = (2, 5)


class TwoTiersThatDoNotRot(Machine):
    slots = (2, 5)
    rot = False


class ThreeTiers(Machine):
    slots = (1, 3, 6)


class TiersThatHoldHalfOfTheBlocks(Machine):
    slots = (2, 5)
    slot = 160


class UselessTiers(Machine):
    slots = (0, 4, 0, 1)


class ATierThatOutlivesTheProcess(Machine):
    slots = (2,)

    def __init__(self) -> None:
        self.drive: dict[int, Tensor] = {}
        super().__init__()

    def make_tiers(self) -> Sequence[CachingTier]:
        return [*super().make_tiers(), LastingTier(self.drive)]


MACHINES: list[type[Machine]] = [
    NoTier,
    OneTier,
    TwoTiers,
    TwoTiersThatDoNotRot,
    ThreeTiers,
    UselessTiers,
    TiersThatHoldHalfOfTheBlocks,
    ATierThatOutlivesTheProcess,
    *(type(f"TwoTiersThatEvictBy-{policy}", (TwoTiers,), {"policy": policy}) for policy in POLICIES if policy != "lru"),
]


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.__name__)
def test_a_hierarchy_is_a_dict_whatever_fails(machine: type[Machine]) -> None:
    examples = max(12, settings.default.max_examples // 5)
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=15))


class BrokenTier(SlabTier):
    """Fails on demand, as a tier behind a network would."""

    def __init__(self) -> None:
        super().__init__(
            name="broken",
            slot_bytes=SLOT_BYTES,
            capacity=8 * SLOT_BYTES,
            eviction="lru",
            device=torch.device("cpu"),
        )
        self.broken = False

    def _open(self) -> Tensor:
        if self.broken:
            raise TierError("tier broken: connection lost")
        return super()._open()


class RottenTier(BrokenTier):
    """Flips a bit of what it reads."""

    can_rot = True

    def read(self, ids: Ids, out: Tensor) -> Found:
        found = super().read(ids, out)
        out[torch.from_numpy(found), 70] ^= 4
        return found


@pytest.fixture
def home(tmp_path: Path) -> Iterator[LmdbHome]:
    with LmdbHome(path=tmp_path / "home", slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch(range(10)))
        yield home


def read(hierarchy: Hierarchy, *ids: int) -> list[bool]:
    """What is found, after its bytes were compared."""
    wanted = make_ids(*ids)
    out = torch.zeros((len(ids), SLOT_BYTES), dtype=torch.uint8)
    found = hierarchy.read(wanted, out)
    made = make_blocks(wanted)
    assert all(same_block(out[row], made[row]) for row in np.flatnonzero(found).tolist())
    return [bool(is_found) for is_found in found]


def test_reads_through_and_keeps(home: LmdbHome) -> None:
    tiers = [gpu(2), pinned(4)]
    hierarchy = Hierarchy(tiers, home, STAMP)
    assert read(hierarchy, 1, 2, 3) == [True] * 3
    assert tiers[0].contains(make_ids(1, 2, 3)).tolist() == [False, True, True]
    assert tiers[1].contains(make_ids(1, 2, 3)).tolist() == [True, True, True]
    # Found in one tier each, and twice; what is missing lies apart.
    assert read(hierarchy, 3, 7, 2, 1, 99, 7, 3) == [True, True, True, True, False, True, True]
    size = SLOT_BYTES
    assert hierarchy.stats() == (
        TierStats("gpu", hits=3, misses=3 + 4, bytes=3 * size),
        TierStats("pinned", hits=1, misses=3 + 3, bytes=1 * size),
        TierStats("lmdb", hits=3 + 2, misses=1, bytes=5 * size),
    )
    hierarchy.close()


def test_lifts(home: LmdbHome) -> None:
    home.commit(make_batch(range(10, 10 + 2 * LIFT_BLOCKS)))
    tiers = [gpu(100), pinned(100)]
    hierarchy = Hierarchy(tiers, home, STAMP)
    ids = home.ids()
    assert hierarchy.lift(np.concatenate([ids, ids[:3]])).all()
    assert len(tiers[0]) == len(tiers[1]) == len(ids)
    assert hierarchy.lift(make_ids(99_999)).tolist() == [False]
    assert hierarchy.lift(make_ids()).tolist() == []
    assert [stats.lifted for stats in hierarchy.stats()] == [0, 0, len(ids)]
    assert read(hierarchy, *ids.tolist()) == [True] * len(ids)
    assert [stats.hits for stats in hierarchy.stats()] == [len(ids), 0, 0]
    hierarchy.close()


def test_a_block_that_fits_no_tier_comes_from_the_home(home: LmdbHome) -> None:
    tiers = [gpu(64, slot=160), pinned(64, slot=160)]
    hierarchy = Hierarchy(tiers, home, STAMP)
    ids = home.ids()
    fits = [length(block.numpy()) <= 160 for block in make_blocks(ids)]
    assert any(fits)
    assert not all(fits)
    for _ in range(2):
        assert all(read(hierarchy, *ids.tolist()))
        assert hierarchy.held(ids).tolist() == fits
    assert [stats.hits for stats in hierarchy.stats()][-1] == 2 * len(ids) - sum(fits)
    assert hierarchy.lift(ids).tolist() == fits


def test_a_bad_block_is_quarantined_and_recall_goes_on(home: LmdbHome) -> None:
    bad = make_blocks(make_ids(50))
    bad[0, 20] ^= 1  # the bank's fingerprint, which the home does not check
    home.write(make_ids(50), bad)
    tiers = [gpu(4), pinned(4)]
    hierarchy = Hierarchy(tiers, home, STAMP)
    assert read(hierarchy, 1, 50, 2) == [True, False, True]
    assert home.quarantined() == {50: "block 50: belongs to another bank"}
    assert not any(50 in tier for tier in tiers)
    assert [stats.bad_blocks for stats in hierarchy.stats()] == [0, 0, 1]
    assert read(hierarchy, 1, 50, 2) == [True, False, True]
    assert [stats.bad_blocks for stats in hierarchy.stats()] == [0, 0, 1]
    hierarchy.close()


def test_what_is_set_apart_after_it_was_read_is_held_nowhere(home: LmdbHome) -> None:
    tiers = [gpu(4), pinned(4)]
    hierarchy = Hierarchy(tiers, home, STAMP)
    assert read(hierarchy, 1, 2) == [True, True]
    hierarchy.set_apart(1, "does not decode")
    assert home.quarantined() == {1: "does not decode"}
    assert not any(1 in tier for tier in tiers)
    assert read(hierarchy, 1, 2) == [False, True]
    hierarchy.close()


def test_a_bad_block_of_a_home_that_cannot_be_written(tmp_path: Path) -> None:
    bad = make_blocks(make_ids(1))
    bad[0, 20] ^= 1
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.write(make_ids(1), bad)
    with LmdbHome(path=tmp_path, read_only=True) as home:
        hierarchy = Hierarchy([gpu(4)], home, STAMP)
        for count in (1, 2):
            assert read(hierarchy, 1) == [False]
            assert hierarchy.stats()[-1].bad_blocks == count


def test_faults_of_a_caching_tier_are_counted_and_invisible(home: LmdbHome) -> None:
    broken = BrokenTier()
    hierarchy = Hierarchy([broken, pinned(8)], home, STAMP)
    assert read(hierarchy, 1) == [True]
    broken.broken = True
    assert read(hierarchy, 1, 2) == [True, True]
    assert hierarchy.lift(make_ids(3)).tolist() == [True]
    assert hierarchy.stats()[0].faults >= 3
    assert hierarchy.stats()[1].faults == 0
    broken.broken = False
    assert read(hierarchy, 1) == [True]
    assert hierarchy.stats()[0].hits == 1


def test_a_tier_that_could_not_discard_is_not_asked_until_it_did(home: LmdbHome) -> None:
    broken = BrokenTier()
    hierarchy = Hierarchy([broken], home, STAMP)
    assert read(hierarchy, 1, 2) == [True, True]
    broken.broken = True
    hierarchy.discard(make_ids(1))
    assert read(hierarchy, 1, 2) == [False, True]
    broken.broken = False
    assert read(hierarchy, 1, 2) == [False, True]
    assert broken.contains(make_ids(1, 2)).tolist() == [False, True]


def test_blocks_from_a_tier_that_rots_are_checked(home: LmdbHome) -> None:
    rotten = RottenTier()
    hierarchy = Hierarchy([gpu(0), rotten, pinned(8)], home, STAMP)
    assert read(hierarchy, 1, 2) == [True, True]
    assert read(hierarchy, 1, 2) == [True, True]
    stats = hierarchy.stats()
    assert [each.bad_blocks for each in stats] == [0, 2, 0, 0]
    assert [each.hits for each in stats] == [0, 0, 2, 2]
    assert home.quarantined() == {}


def test_faults_of_the_home_are_raised(home: LmdbHome) -> None:
    hierarchy = Hierarchy([gpu(4)], home, STAMP)
    assert read(hierarchy, 1) == [True]
    home.close()
    assert read(hierarchy, 1) == [True]
    with pytest.raises(TierClosedError):
        read(hierarchy, 1, 2)
    with pytest.raises(TierClosedError):
        hierarchy.discard(make_ids(1))
    assert read(hierarchy, 1) == [True]


def test_a_block_forgotten_while_it_is_read_does_not_come_back(tmp_path: Path) -> None:
    """The forgetting happens after the home was read and before the block is given to the caching tiers."""

    class SlowHome(LmdbHome):
        def read(self, ids: Ids, out: Tensor) -> Found:
            found = super().read(ids, out)
            if found.any():
                forgetting = threading.Thread(target=hierarchy.discard, args=(make_ids(1),))
                forgetting.start()
                forgetting.join()
            return found

    tiers = [gpu(4), pinned(4)]
    with SlowHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch([1, 2]))
        hierarchy = Hierarchy(tiers, home, STAMP)
        assert read(hierarchy, 1, 2) == [True, True]  # it was there when it was asked for
        for tier in tiers:
            assert tier.contains(make_ids(1, 2)).tolist() == [False, True]
        assert read(hierarchy, 1, 2) == [False, True]


def faulty(tier: CachingTier, *faults: Fault) -> FaultyTier:
    return FaultyTier(tier, Schedule(*faults))


def test_what_is_forgotten_is_not_held_by_a_tier_that_failed_to_discard(home: LmdbHome) -> None:
    inner = pinned(3)
    tier = faulty(inner, Fault("error", rate=1, methods={"discard"}))
    hierarchy = Hierarchy([tier], home, STAMP)
    assert read(hierarchy, 1, 2) == [True, True]
    hierarchy.discard(make_ids(1))
    assert 1 in inner
    assert not hierarchy.held(make_ids(1)).any()
    assert not hierarchy.lift(make_ids(1)).any()
    hierarchy.score(make_ids(1), np.ones(1, np.float32))
    stats = hierarchy.stats()[0]
    assert stats.faults == len(tier.schedule.injected)
    assert read(hierarchy, 1, 2, 3) == [False, True, True]
    assert hierarchy.stats()[0].unanswered == stats.unanswered + 3
    assert 3 not in inner  # it is asked for nothing
    tier.schedule.set()
    assert hierarchy.held(make_ids(1, 2)).tolist() == [False, True]
    assert 1 not in inner


def test_a_bad_copy_is_discarded_and_the_next_tier_answers(home: LmdbHome) -> None:
    inner = pinned(3)
    tier = faulty(inner, Fault("torn_write", at={1}))
    hierarchy = Hierarchy([tier], home, STAMP)
    assert read(hierarchy, 1) == [True]
    for _ in range(3):
        assert read(hierarchy, 1) == [True]
    assert [(stats.bad_blocks, stats.hits) for stats in hierarchy.stats()] == [(1, 2), (0, 2)]
    assert home.quarantined() == {}


def test_every_tier_is_closed_whatever_one_raises(home: LmdbHome) -> None:
    tiers = [gpu(2), pinned(2), pinned(2)]
    hierarchy = Hierarchy([faulty(tier, Fault("error", rate=1, methods={"close"})) for tier in tiers], home, STAMP)
    hierarchy.close()
    assert [stats.faults for stats in hierarchy.stats()] == [1, 1, 1, 0]
    for tier in tiers:
        with pytest.raises(TierClosedError):
            len(tier)


@pytest.mark.parametrize("kind", ["bit_flip", "short_read", "stale", "other_id"])
def test_a_block_that_only_came_wrong_from_the_home_is_read_again(home: LmdbHome, kind: Kind) -> None:
    faulty_home = FaultyHome(home, Schedule(Fault(kind, at={2})))
    hierarchy = Hierarchy([gpu(4)], faulty_home, STAMP)
    assert read(hierarchy, 4) == [True]
    assert read(hierarchy, 1, 99, 2) == [True, False, True]
    assert len(faulty_home.schedule.injected) == 1
    stats = hierarchy.stats()[-1]
    assert (stats.hits, stats.bad_blocks, stats.recovered, stats.faults) == (3, 0, 1, 0)
    assert home.quarantined() == {}


def test_a_home_that_fails_when_asked_again_is_a_typed_error(home: LmdbHome) -> None:
    faulty_home = FaultyHome(home, Schedule(Fault("bit_flip", at={1}), Fault("error", at={2}, methods={"read"})))
    hierarchy = Hierarchy([gpu(4)], faulty_home, STAMP)
    with pytest.raises(TierError, match="read failed"):
        read(hierarchy, 1, 2)
    assert hierarchy.stats()[-1] == TierStats("lmdb", faults=1, unanswered=2)
    assert home.quarantined() == {}
    assert read(hierarchy, 1, 2) == [True, True]


def test_a_block_that_cannot_be_set_apart_is_a_miss_and_the_others_are_found(home: LmdbHome) -> None:
    bad = make_blocks(make_ids(50))
    bad[0, 20] ^= 1
    home.write(make_ids(50), bad)
    hierarchy = Hierarchy([], FaultyHome(home, Schedule(Fault("error", at={1}, methods={"quarantine"}))), STAMP)
    assert read(hierarchy, 1, 50, 2) == [True, False, True]
    assert home.quarantined() == {}
    assert read(hierarchy, 1, 50, 2) == [True, False, True]
    assert set(home.quarantined()) == {50}
    assert hierarchy.stats() == (TierStats("lmdb", 4, 2, 4 * SLOT_BYTES, bad_blocks=2, faults=1),)


def test_what_was_forgotten_while_a_tier_was_away_is_discarded_when_it_is_taken(home: LmdbHome) -> None:
    drive = {id: make_blocks(make_ids(id))[0] for id in (1, 2, 77)}
    home.discard(make_ids(1))
    tier = LastingTier(drive)
    hierarchy = Hierarchy([tier], home, STAMP)
    assert tier.ids().tolist() == [2]
    assert read(hierarchy, 1, 2, 77) == [False, True, False]
    assert hierarchy.stats()[0].hits == 1


@pytest.mark.parametrize("method", ["ids", "discard"])
def test_a_tier_that_cannot_be_compared_with_the_home_is_not_asked_until_it_can(home: LmdbHome, method: str) -> None:
    inner = LastingTier({id: make_blocks(make_ids(id))[0] for id in (1, 2)})
    home.discard(make_ids(1))
    tier = faulty(inner, Fault("error", rate=1, methods={method}))
    hierarchy = Hierarchy([tier], home, STAMP)
    assert hierarchy.stats()[0].faults == 1
    assert read(hierarchy, 1, 2) == [False, True]
    assert not hierarchy.held(make_ids(1, 2)).any()
    assert hierarchy.stats()[0].hits == 0
    tier.schedule.set()
    assert read(hierarchy, 1, 2) == [False, True]
    assert hierarchy.stats()[0].hits == 1
    assert inner.ids().tolist() == [2]


def test_a_home_that_fails_at_opening_keeps_a_lasting_tier_waiting(home: LmdbHome) -> None:
    inner = LastingTier({id: make_blocks(make_ids(id))[0] for id in (1, 2)})
    home.discard(make_ids(1))
    faulty_home = FaultyHome(home, Schedule(Fault("error", at={1, 2}, methods={"contains"})))
    hierarchy = Hierarchy([inner], faulty_home, STAMP)
    assert not hierarchy.held(make_ids(1, 2)).any()
    assert hierarchy.held(make_ids(1, 2)).tolist() == [False, True]
    assert [stats.faults for stats in hierarchy.stats()] == [0, 2]


def test_blocks_of_another_bank_in_a_lasting_tier_are_found_out_though_it_says_that_it_cannot_rot(
    home: LmdbHome,
) -> None:
    foreign = BlockStamp(bank="0a" * 16, codec=STAMP.codec)
    tier = LastingTier({id: make_blocks(make_ids(id), stamp=foreign)[0] for id in (1, 2)})
    assert not tier.can_rot
    hierarchy = Hierarchy([tier], home, STAMP)
    assert read(hierarchy, 1, 2, 3) == [True, True, True]
    assert hierarchy.stats()[0].bad_blocks == 2
    assert read(hierarchy, 1, 2, 3) == [True, True, True]
    assert hierarchy.stats()[0].hits == 3


def test_a_home_that_cannot_say_what_was_forgotten_keeps_blocks_out_of_the_tiers(tmp_path: Path) -> None:
    """Another block is forgotten while one is read, so the home is asked whether that one is still there."""

    class Home(FaultyHome):
        def read(self, ids: Ids, out: Tensor) -> Found:
            found = super().read(ids, out)
            forgetting = threading.Thread(target=hierarchy.discard, args=(make_ids(2),))
            forgetting.start()
            forgetting.join()
            return found

    tier = pinned(4)
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as inner:
        inner.commit(make_batch([1, 2]))
        home = Home(inner, Schedule(Fault("error", rate=1, methods={"contains"})))
        hierarchy = Hierarchy([tier], home, STAMP)
        assert read(hierarchy, 1) == [True]
        assert len(tier) == 0
        home.schedule.set()
        assert read(hierarchy, 1) == [True]
        assert 1 in tier


ALL_AT_ONCE = [
    Fault("error", rate=0.05),
    Fault("lost_reply", rate=0.05),
    Fault("bit_flip", rate=0.1),
    Fault("other_id", rate=0.1),
    Fault("torn_write", rate=0.1),
]


@pytest.mark.parametrize("faults", [[], ALL_AT_ONCE], ids=["all well", "with faults"])
def test_threads_read_lift_and_forget(home: LmdbHome, faults: list[Fault]) -> None:
    home.commit(make_batch(range(10, 40)))
    inner = [gpu(3), pinned(8)]
    tiers = [FaultyTier(tier, Schedule(*faults, seed=seed)) for seed, tier in enumerate(inner)]
    hierarchy = Hierarchy(tiers, home, STAMP)
    forgotten: set[int] = set()

    def work(number: int) -> None:
        random = np.random.default_rng(number)
        for turn in range(25):
            ids = random.integers(0, 40, 5).astype(np.uint64)
            gone = forgotten.copy()
            if turn % 3 == 0:
                hierarchy.lift(ids)
            found = read(hierarchy, *ids.tolist())
            for id, is_found in zip(ids.tolist(), found, strict=True):
                assert not (id in gone and is_found)
                assert is_found or id % 4 == 3
            if turn % 5 == 0:
                one = int(random.integers(0, 10)) * 4 + 3
                hierarchy.discard(make_ids(one))
                forgotten.add(one)
            assert len(inner[0]) <= 3
            assert len(inner[1]) <= 8

    together(5, work)
    for wrapped, stats in zip(tiers, hierarchy.stats(), strict=False):
        assert bool(wrapped.schedule.injected) == bool(faults)
        assert stats.faults == sum(injection.id is None for injection in wrapped.schedule.injected)
        wrapped.schedule.set()
    assert not any(read(hierarchy, *sorted(forgotten)))
    assert home.quarantined() == {}
    for tier in inner:
        assert not tier.contains(make_ids(*forgotten)).any()
    hierarchy.close()


def test_a_closed_hierarchy_refuses_and_leaves_the_home_open(home: LmdbHome) -> None:
    hierarchy = Hierarchy([gpu(4)], home, STAMP)
    hierarchy.close()
    hierarchy.close()
    uses: list[Any] = [hierarchy.lift, hierarchy.held, hierarchy.discard]
    for use in uses:
        with pytest.raises(TierClosedError):
            use(make_ids(1))
    with pytest.raises(TierClosedError):
        read(hierarchy, 1)
    assert len(home) == 10


def test_a_buffer_of_another_shape_is_refused(home: LmdbHome) -> None:
    with pytest.raises(InputError):
        Hierarchy([], home, STAMP).read(make_ids(1), torch.zeros((1, SLOT_BYTES + 1), dtype=torch.uint8))


@pytest.mark.gpu
def test_through_a_gpu(home: LmdbHome) -> None:
    device = resolve("cuda")
    tiers = [GpuTier(slot_bytes=SLOT_BYTES, capacity=2 * SLOT_BYTES, device=device), pinned(4)]
    hierarchy = Hierarchy(tiers, home, STAMP, device)
    ids = make_ids(1, 2, 99, 3, 4)
    made = make_blocks(ids)
    for _ in range(3):
        out = torch.zeros((5, SLOT_BYTES), dtype=torch.uint8, device="cuda")
        assert hierarchy.read(ids, out).tolist() == [True, True, False, True, True]
        assert all(same_block(out[row], made[row]) for row in (0, 1, 3, 4))
    assert hierarchy.lift(make_ids(5, 6)).all()
    assert tiers[0].contains(make_ids(5, 6)).all()
    hierarchy.close()
