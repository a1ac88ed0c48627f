"""`HierarchyMachine`: a hierarchy under faults against a dict, in every order of calls that hypothesis thinks of."""

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import numpy as np
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from m3runtime.errors import BankError, TierError
from m3runtime.memory.block import Found, length
from m3runtime.storage.abilities import Persistent
from m3runtime.storage.hierarchy import Hierarchy
from m3runtime.storage.home import Home
from m3runtime.storage.tier import CachingTier
from m3runtime.testing.blocks import SLOT_BYTES, STAMP, make_batch, make_blocks, make_ids, same_block
from m3runtime.testing.faulty import KINDS, Fault, FaultyHome, FaultyTier, Injection, Kind, Schedule

# What a step does, to which ids, and a number that says how. Ids are counted back from the last that was committed.
Action = tuple[str, list[int], int]
ACTIONS = ("commit", "read", "lift", "prefetch", "recall", "recall", "forget", "press", "damage")
actions = st.lists(st.tuples(st.sampled_from(ACTIONS), st.lists(st.integers(-1, 6), max_size=4), st.integers(0, 7)))
# Which calls a fault strikes: a share of them, or the n-th from now.
rates = st.sampled_from([0.2, 0.5, 1.0]).map(lambda rate: (rate, set[int]()))
strikes = rates | st.integers(1, 4).map(lambda at: (0.0, {at}))
# Failing calls are the most telling, most of all where every method fails.
kinds = st.sampled_from(("error", "lost_reply")) | st.sampled_from(KINDS)
methods = st.just("") | st.sampled_from(("read", "write", "discard", "close"))

NEVER_USED = 2**63
"""An id that no home of the machine ever has."""


class HierarchyMachine(RuleBasedStateMachine):
    """Subclass it, say how to make tiers and home, and give pytest the subclass's ``TestCase``.

    It wraps every tier and the home itself, and lets them fail. After every step, whatever failed: what is found is
    right; all that is committed, and neither forgotten nor damaged in the home, is found, unless the home failed and
    the caller was told so; what is forgotten is never found, and not held by a tier that is whole; no tier holds more
    than its capacity; the statistics add up, and count every fault.
    Once the faults are off everything is as if there had been none, without a restart.
    """

    rot: bool = True
    """May faults damage bytes of the caching tiers? If not, they only fail, and need not be checked."""

    def make_tiers(self) -> Sequence[CachingTier]:
        """Caching tiers as a new process has them, slots of `SLOT_BYTES`, fastest first; a few blocks each find most.

        What outlives the process may lie in ``self.root``.
        """
        raise NotImplementedError

    def open_home(self, folder: Path) -> Home:
        """The home in this folder, made if there is none."""
        raise NotImplementedError

    def corrupt(self, home: Home, id: int) -> bool:  # noqa: ARG002 - for those who can
        """Change a byte of a stored block behind the home's back. False if there is no such back door."""
        return False

    def kill(self, folder: Path, left: Path) -> None:
        """Put into ``left`` what a kill of the process would leave of a home in ``folder``, which is open."""
        shutil.copytree(folder, left)

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory(prefix="m3-hierarchy-")
        self.root = Path(self.temporary.name)
        self.numbers = count()
        self.folder = self.root / f"home-{next(self.numbers)}"
        self.committed: set[int] = set()
        self.forgotten: set[int] = set()
        self.damaged: set[int] = set()
        self.next_id = 0
        self.schedules: list[Schedule] = []
        self.start()

    def start(self) -> None:
        """Open everything as a new process would. Faults that are on go on."""
        self.home = self.open_home(self.folder)
        self.tiers = list(self.make_tiers())
        if not self.schedules:  # the last is the home's
            self.schedules = [Schedule(seed=seed) for seed in range(len(self.tiers) + 1)]
            self.whole, self.is_home_whole = [True for _ in self.tiers], True
        for place, tier in enumerate(self.tiers):
            # What it holds is compared with the home first.
            self.whole[place] &= self.is_home_whole or not isinstance(tier, Persistent)
        faulty = [FaultyTier(tier, schedule) for tier, schedule in zip(self.tiers, self.schedules[:-1], strict=True)]
        if not self.rot:
            for wrapped, tier in zip(faulty, self.tiers, strict=True):
                wrapped.can_rot = tier.can_rot
        self.before = [len(schedule.injected) for schedule in self.schedules]
        self.faulty_home = FaultyHome(self.home, self.schedules[-1])
        self.hierarchy = Hierarchy(faulty, self.faulty_home, STAMP)
        self.background = ThreadPoolExecutor(1)
        self.lifts: list[Future[Found]] = []
        self.is_busy = False
        self.has_overlapped = False
        self.asked = 0

    def stop(self) -> None:
        """Close everything."""
        self.background.shutdown()
        self.hierarchy.close()
        self.home.close()

    def teardown(self) -> None:
        self.stop()
        self.temporary.cleanup()

    # What happened

    @contextmanager
    def the_home_may_fail(self) -> Iterator[None]:
        """An error ends the block, if the home was made to fail meanwhile."""
        before = len(self.schedules[-1].injected)
        try:
            yield
        except (TierError, BankError):
            if not any(injection.id is None for injection in self.schedules[-1].injected[before:]):
                raise

    def injected(self, place: int) -> tuple[Injection, ...]:
        """The faults of one tier since the hierarchy was opened."""
        return self.schedules[place].injected[self.before[place] :]

    def torn(self, place: int) -> set[int]:
        """Ids whose blocks a tier was given damaged, at any time: no reading of them can be right."""
        return {
            injection.id
            for injection in self.schedules[place].injected
            if injection.id is not None and injection.method != "read"
        }

    def read_wrong_twice(self) -> set[int]:
        """Ids that the home's faults may have made look damaged for good."""
        reads = Counter(injection.id for injection in self.schedules[-1].injected if injection.method == "read")
        return {id for id, times in reads.items() if id is not None and times > 1}

    def drain(self) -> None:
        """Let what runs in the background end."""
        errors = [error for lift in self.lifts if (error := lift.exception(timeout=600)) is not None]
        failed = sum(injection.id is None for injection in self.injected(-1))
        assert len(errors) <= failed
        assert all(isinstance(error, TierError | BankError) for error in errors)
        self.lifts.clear()
        self.is_busy = False

    # Steps

    @rule(steps=actions)
    def act(self, steps: list[Action]) -> None:
        """Take these steps, and look at the laws after each."""
        for name, backs, number in steps:
            getattr(self, name)([max(0, self.next_id - 1 - back) for back in backs], number)
            self.the_laws_hold()

    def commit(self, wanted: list[int], number: int) -> None:
        """Commit as many new blocks as ids are wanted, or leave a gap before them."""
        first = self.next_id + number % 2
        with self.the_home_may_fail():
            self.faulty_home.commit(make_batch(range(first, first + len(wanted))))
            self.committed.update(range(first, first + len(wanted)))
            self.next_id = first + len(wanted) if wanted else self.next_id
        assert self.home.next_id() == self.next_id

    def read(self, wanted: list[int], number: int) -> None:
        """Read through the hierarchy."""
        self.check_read(wanted, number % 3)

    def check_read(self, wanted: list[int], before: int) -> None:
        """Read into rows of a larger slab that ``before`` others precede."""
        ids = make_ids(*wanted)
        slab = torch.full((before + len(ids) + 1, SLOT_BYTES), 0xEE, dtype=torch.uint8)
        self.asked += len(ids)
        with self.the_home_may_fail():
            found = self.hierarchy.read(ids, slab[before : before + len(ids)])
            self.check_rows(wanted, found.tolist(), slab[before:])
            damaged = self.damaged | self.torn(-1) | self.read_wrong_twice()
            for id, is_found in zip(wanted, found.tolist(), strict=True):
                assert is_found or id not in self.committed - damaged, f"{id} is lost"
        assert bool((slab[:before] == 0xEE).all())
        assert bool((slab[-1] == 0xEE).all())

    def check_rows(self, wanted: list[int], found: list[bool], rows: torch.Tensor) -> None:
        """Fail unless what was found is remembered, and right."""
        for row, (id, is_found) in enumerate(zip(wanted, found, strict=True)):
            if is_found:
                assert id in self.committed, f"{id} is not remembered and was found"
                assert same_block(rows[row], make_blocks(make_ids(id))[0]), f"{id} came back with other bytes"

    def lift(self, wanted: list[int], _: int) -> None:
        """Lift, and compare with what the tiers hold."""
        with self.the_home_may_fail():
            held = self.hierarchy.lift(make_ids(*wanted))
            for id, is_held in zip(wanted, held.tolist(), strict=True):
                assert id in self.committed or not is_held
                if all(self.whole) and not self.is_busy:
                    assert is_held == any(id in tier for tier in self.tiers)

    def prefetch(self, wanted: list[int], number: int) -> None:
        """Lift in the background, and wait for it or not."""
        self.lifts.append(self.background.submit(self.hierarchy.lift, make_ids(*wanted)))
        self.is_busy = True
        if number % 2:
            self.drain()
        else:
            self.has_overlapped = True

    def recall(self, wanted: list[int], number: int) -> None:
        """Score and read, as a runtime does for a chunk."""
        self.hierarchy.score(make_ids(*wanted), np.linspace(-1, number / 7, len(wanted), dtype=np.float32))
        self.check_read(wanted, 0)

    def forget(self, wanted: list[int], _: int) -> None:
        """Forget: after that they are to be found nowhere."""
        with self.the_home_may_fail():
            self.hierarchy.discard(make_ids(*wanted))
            self.forgotten.update(self.committed.intersection(wanted))
            self.committed.difference_update(wanted)

    def press(self, wanted: list[int], number: int) -> None:
        """Blocks given straight to a tier make it evict others; what it holds after that is right."""
        if not self.tiers:
            return
        self.drain()  # a fault notes a torn block when it is held already
        place = number % len(self.tiers)
        tier, given = self.tiers[place], make_ids(*self.committed.intersection(wanted))
        blocks = make_blocks(given)
        fit = [row for row, block in enumerate(blocks.numpy()) if length(block) <= tier.slot_bytes]
        tier.write(given[fit], blocks[fit, : tier.slot_bytes].contiguous())
        known = range(self.next_id) if self.whole[place] else sorted(self.committed)
        ids = [id for id in known if id not in self.torn(place)]
        rows = torch.zeros((len(ids), tier.slot_bytes), dtype=torch.uint8)
        self.check_rows(ids, tier.read(make_ids(*ids), rows).tolist(), rows)

    def damage(self, wanted: list[int], _: int) -> None:
        """Damage a block where the home stores it."""
        self.drain()
        for id in wanted[:1]:
            if id in self.committed - self.damaged and self.corrupt(self.home, id):
                self.damaged.add(id)

    @rule(place=st.integers(0, 7), kind=kinds, strike=strikes, method=methods, steps=actions)
    def fault_on(
        self, place: int, kind: Kind, strike: tuple[float, set[int]], method: str, steps: list[Action]
    ) -> None:
        """A tier, or the home, begins to fail, and is used."""
        place %= len(self.schedules)
        is_home = place == len(self.tiers)
        damages = kind not in {"error", "lost_reply", "no_space"}
        # What cannot rot does not damage, and of a home that did what it does not answer for nobody can say what it
        # should hold.
        if (kind == "lost_reply" and is_home) or (damages and not (self.rot or is_home)):
            kind = "error"
        self.schedules[place].set(Fault(kind, *strike, methods={method} if method and not damages else ()))
        if is_home:
            self.is_home_whole = False
        else:
            self.whole[place] = False
        self.act(steps)

    @precondition(lambda self: not (self.is_home_whole and all(self.whole)))
    @rule(place=st.integers(0, 7), steps=actions)
    def fault_off(self, place: int, steps: list[Action]) -> None:
        """It works again; what it owes is settled by what it is asked for."""
        self.schedules[place % len(self.schedules)].set()
        self.act(steps)

    @precondition(lambda self: not (self.is_home_whole and all(self.whole)))
    @rule()
    def recover(self) -> None:
        """All faults off: one reading later everything is as if there had been none."""
        self.drain()
        for schedule in self.schedules:
            schedule.set()
        everything = [*sorted(self.committed | self.forgotten), NEVER_USED]
        self.check_read(everything, 0)
        self.whole, self.is_home_whole = [True for _ in self.tiers], True
        self.check_read(everything, 1)

    @rule(killed=st.booleans())
    def reopen(self, killed: bool) -> None:
        """Close everything and open it again; or open the home from what lies there, without closing it first."""
        if killed:
            self.drain()  # a kill stops everything at one instant, a copy does not
            left = self.root / f"home-{next(self.numbers)}"
            self.kill(self.folder, left)
            self.stop()
            shutil.rmtree(self.folder)
            self.folder = left
        else:
            self.stop()
        self.start()

    # Laws

    @invariant()
    def the_laws_hold(self) -> None:
        self.the_home_holds_what_is_committed()
        self.what_is_forgotten_is_nowhere()
        self.capacity_is_kept()
        self.the_statistics_add_up()

    def the_home_holds_what_is_committed(self) -> None:
        there, apart = set(self.home.ids().tolist()), set(self.home.quarantined())
        assert there | apart == self.committed
        assert apart <= self.damaged | self.torn(-1) | self.read_wrong_twice()
        assert self.is_busy or not there & apart

    def what_is_forgotten_is_nowhere(self) -> None:
        gone = make_ids(*sorted(self.forgotten))
        assert not self.home.contains(gone).any()
        for whole, tier in zip(self.whole, self.tiers, strict=True):
            assert not whole or not tier.contains(gone).any()

    def capacity_is_kept(self) -> None:
        for tier in self.tiers:
            assert tier.capacity is not None
            assert len(tier) * tier.slot_bytes <= tier.capacity

    def the_statistics_add_up(self) -> None:
        if self.is_busy:  # what runs in the background counts too
            return
        asked = self.asked
        for place, stats in enumerate(self.hierarchy.stats()):
            injected = self.injected(place)
            assert stats.faults == sum(one.id is None and one.method != "commit" for one in injected)
            assert stats.hits + stats.misses + stats.unanswered == asked
            assert stats.bytes == stats.hits * [*self.tiers, self.home][place].slot_bytes
            asked = stats.misses + stats.unanswered
            is_home = place == len(self.tiers)
            failed_checks = stats.bad_blocks + is_home * (stats.bad_blocks + stats.recovered)
            spoilt = sum(one.id is not None and one.method == "read" for one in injected)
            if is_home and (self.has_overlapped or stats.faults):
                continue  # between two reads of a bad block another call may have taken it away, or a fault come
            assert failed_checks >= spoilt
            assert failed_checks == spoilt or self.torn(place) or (is_home and self.damaged)
