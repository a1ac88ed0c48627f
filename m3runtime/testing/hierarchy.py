"""`HierarchyMachine`: a hierarchy against a dict, in every order of calls that hypothesis thinks of."""

import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from m3runtime.hierarchy import Hierarchy
from m3runtime.testing.blocks import SLOT_BYTES, STAMP, make_batch, make_blocks, make_ids, same_block
from m3runtime.testing.tier import check_read
from m3runtime.tier import CachingTier, Home

some_ids = st.lists(st.integers(0, 15), max_size=8)


class HierarchyMachine(RuleBasedStateMachine):
    """Subclass it, say how to make tiers and home, and give pytest the subclass's ``TestCase``.

    After every step: what is found is right, all that is committed and not forgotten is found, what is
    forgotten is nowhere, no tier holds more than its capacity or lets go of what is pinned, and the
    statistics add up.
    """

    def make_tiers(self) -> Sequence[CachingTier]:
        """New caching tiers with slots of `SLOT_BYTES`, fastest first; a few blocks each find the most."""
        raise NotImplementedError

    def open_home(self, folder: Path) -> Home:
        """The home in this folder, made if there is none."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="m3-hierarchy-")
        self.committed: set[int] = set()
        self.forgotten: set[int] = set()
        self.next_id = 0
        self.start()

    def start(self) -> None:
        """Open everything as a new process would."""
        self.home = self.open_home(Path(self.folder.name))
        self.tiers = self.make_tiers()
        self.hierarchy = Hierarchy(self.tiers, self.home, STAMP)
        self.pins: Counter[int] = Counter()
        self.kept: list[set[int]] = [set() for _ in self.tiers]
        self.asked = 0

    def teardown(self) -> None:
        self.hierarchy.close()
        self.home.close()
        self.folder.cleanup()

    @rule(count=st.integers(0, 3), gap=st.integers(0, 1))
    def commit(self, count: int, gap: int) -> None:
        first = self.next_id + gap
        self.home.commit(make_batch(range(first, first + count)))
        self.committed.update(range(first, first + count))
        self.next_id = first + count if count else self.next_id
        assert self.home.next_id() == self.next_id

    @rule(wanted=some_ids, before=st.integers(0, 2))
    def read(self, wanted: list[int], before: int) -> None:
        ids = make_ids(*wanted)
        slab = torch.full((before + len(ids) + 1, SLOT_BYTES), 0xEE, dtype=torch.uint8)
        found = self.hierarchy.read(ids, slab[before : before + len(ids)])
        self.asked += len(ids)
        assert found.tolist() == [id in self.committed for id in wanted]
        for row in np.flatnonzero(found).tolist():
            assert same_block(slab[before + row], make_blocks(ids[row : row + 1])[0])
        assert bool((slab[:before] == 0xEE).all())
        assert bool((slab[-1] == 0xEE).all())

    @rule(wanted=some_ids)
    def lift(self, wanted: list[int]) -> None:
        held = self.hierarchy.lift(make_ids(*wanted))
        for id, is_held in zip(wanted, held.tolist(), strict=True):
            assert is_held == any(id in tier for tier in self.tiers)
            assert id in self.committed or not is_held

    @rule(wanted=some_ids)
    def pin(self, wanted: list[int]) -> None:
        pinned = self.hierarchy.pin(make_ids(*wanted))
        self.pins.update(wanted)
        for tier, kept in zip(self.tiers, self.kept, strict=True):
            kept.update(id for id in wanted if id in tier)
        for id, is_pinned in zip(wanted, pinned.tolist(), strict=True):
            assert id in self.committed or not is_pinned
            assert not any(id in tier for tier in self.tiers) or is_pinned

    @rule(wanted=some_ids)
    def unpin(self, wanted: list[int]) -> None:
        self.hierarchy.unpin(make_ids(*wanted))
        self.pins.subtract(wanted)
        self.pins = +self.pins
        self.kept = [kept & set(self.pins) for kept in self.kept]

    @rule(wanted=some_ids)
    def forget(self, wanted: list[int]) -> None:
        self.hierarchy.discard(make_ids(*wanted))
        self.forgotten.update(self.committed.intersection(wanted))
        self.committed.difference_update(wanted)
        for id in wanted:
            self.pins.pop(id, None)
        self.kept = [kept.difference(wanted) for kept in self.kept]

    @precondition(lambda self: self.tiers)
    @rule(wanted=some_ids, number=st.integers(0, 7))
    def look_into_a_tier(self, wanted: list[int], number: int) -> None:
        check_read(self.tiers[number % len(self.tiers)], make_ids(*wanted))

    @rule()
    def restart(self) -> None:
        self.hierarchy.close()
        self.home.close()
        self.start()

    @invariant()
    def the_home_holds_what_is_committed(self) -> None:
        assert self.home.ids().tolist() == sorted(self.committed)

    @invariant()
    def what_is_forgotten_is_nowhere(self) -> None:
        gone = make_ids(*sorted(self.forgotten))
        for tier in (*self.tiers, self.home):
            assert not tier.contains(gone).any()

    @invariant()
    def capacity_is_kept(self) -> None:
        for tier in self.tiers:
            assert tier.capacity is not None
            assert len(tier) * SLOT_BYTES <= tier.capacity

    @invariant()
    def what_is_pinned_stays(self) -> None:
        for tier, kept in zip(self.tiers, self.kept, strict=True):
            assert tier.contains(make_ids(*kept)).all()

    @invariant()
    def the_statistics_add_up(self) -> None:
        asked = self.asked
        for stats in self.hierarchy.stats():
            assert stats.faults == stats.bad_blocks == 0
            assert stats.hits + stats.misses == asked
            assert stats.bytes == stats.hits * SLOT_BYTES
            asked = stats.misses
