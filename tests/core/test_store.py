"""`MemoryStore`: bounded, owned by leases, and never wrong about what it holds."""

import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, precondition, rule

from m3runtime.documents.reference import Place, Reference
from m3runtime.errors import ConfigError, TierClosedError, TierError
from m3runtime.recall.lease import Entry, Lease, Loaded
from m3runtime.recall.memory_store import MemoryStore
from m3runtime.testing.threads import together

FULL = 8
"""Most bytes of a part, here."""
REFERENCE = Reference("a text", 2, places=(Place("a source", 0, 6),))


def store(parts: int, eviction: str = "lru") -> MemoryStore:
    return MemoryStore(parts * FULL, lambda dtype: FULL * dtype.itemsize // 4, slots=max(1, parts), eviction=eviction)


def loaded(size: int = FULL) -> Loaded:
    return Loaded(
        (torch.zeros(size // 2, dtype=torch.uint8), torch.zeros(size - size // 2, dtype=torch.uint8)), REFERENCE
    )


def load(made: MemoryStore, *ids: int, size: int = FULL) -> list[Lease]:
    leases, beyond, _ = made.lease(ids, torch.float32)
    assert not beyond
    for entry in made.claim(leases, made):
        made.settle(entry, loaded(size))
    return leases


class StoreMachine(RuleBasedStateMachine):
    """Any calls in any order, against a model that knows only who leases what."""

    leases = Bundle("leases")
    claims = Bundle("claims")

    def __init__(self) -> None:
        super().__init__()
        self.store = store(4)
        self.live: list[Lease] = []
        self.forgotten: set[Entry] = set()
        self.claimed: set[Entry] = set()
        self.decoded = 0
        self.before = self.store.counts()

    @rule(target=leases, ids=st.sets(st.integers(0, 7), max_size=5), half=st.booleans(), guess=st.booleans())
    def lease(self, ids: set[int], half: bool, guess: bool) -> object:
        dtype = torch.float16 if half else torch.float32
        leases, beyond, blocked_by = self.store.lease(sorted(ids), dtype, guess=guess)
        assert {lease.id for lease in leases} | set(beyond) == ids
        assert len(leases) + len(beyond) == len(ids)
        assert all(lease.entry not in self.forgotten for lease in leases)
        if not guess and beyond:  # only because the rest is leased or loading
            held = {one.entry for one in self.live if not one.is_guess} | {one.entry for one in leases}
            loading = [entry for entry in self.entries() if entry.state in ("wanted", "loading")]
            assert sum(entry.size for entry in held.union(loading)) + FULL > self.store.capacity
            guessed = {entry.done for entry in loading if entry not in held and entry not in self.forgotten}
            assert guessed <= set(blocked_by)
        self.live += leases
        return multiple(*leases)

    @rule(target=leases, lease=leases)
    def share(self, lease: Lease) -> object:
        if not lease.is_live or lease.is_guess or lease.entry.state != "ready":
            return multiple()
        shared = self.store.share([lease])
        self.live += shared
        return multiple(*shared)

    @rule(target=claims, lease=leases)
    def claim(self, lease: Lease) -> object:
        was = lease.entry.state
        entries = self.store.claim([lease], self)
        assert entries == ([lease.entry] if was == "wanted" else [])
        self.claimed.update(entries)
        return multiple(*entries)

    @rule(entry=consumes(claims), size=st.sampled_from([2, FULL // 2]))
    def settle(self, entry: Entry, size: int) -> None:
        if entry.state == "loading":
            self.store.settle(entry, loaded(size))
            self.decoded += 1
            assert entry.done.done()
            assert entry.state == ("gone" if entry in self.forgotten else "ready")

    @rule(entry=consumes(claims))
    def settle_as_missing(self, entry: Entry) -> None:
        if entry.state == "loading":
            self.store.settle(entry, None)
            assert entry.state == "gone"

    @rule(entry=consumes(claims))
    def fail(self, entry: Entry) -> None:
        self.store.fail([entry], self, TierError("the drive is gone"))
        assert entry.done.done()

    @rule(entry=consumes(claims))
    def load_only_what_is_wanted(self, entry: Entry) -> None:
        if entry.state == "loading":
            wanted = self.store.keep_wanted([entry])
            assert bool(wanted) == bool(entry.leases or entry.guesses)
            self.store.fail(wanted, self, TierError("the drive is gone"))

    @rule(lease=leases)
    def release(self, lease: Lease) -> None:
        self.store.release([lease, lease])
        self.live = [one for one in self.live if one is not lease]
        assert not lease.is_live

    @rule(id=st.integers(0, 7))
    def forget(self, id: int) -> None:
        self.forgotten.update(entry for entry in self.entries() if entry.id == id)
        self.store.forget([id])

    def entries(self) -> set[Entry]:
        return {lease.entry for lease in self.live} | self.claimed

    @invariant()
    def the_books_agree(self) -> None:
        self.store.check_integrity()
        counts = self.store.counts()
        hard = {one.entry for one in self.live if not one.is_guess}
        assert counts.leased == len(hard)
        assert counts.guessed == len({one.entry for one in self.live if one.is_guess})
        assert counts.bytes <= counts.capacity
        known = self.store._entries.values()
        assert counts.bytes == sum(entry.size for entry in {*known, *self.entries()})
        assert counts.decoded == self.decoded
        for name in ("hits", "evicted", "decoded", "wasted_bytes"):
            assert getattr(counts, name) >= getattr(self.before, name), "counters only grow"
        self.before = counts

    @invariant()
    def a_leased_part_stays_readable(self) -> None:
        for lease in self.live:
            if not lease.is_guess and lease.entry.state == "ready":
                assert lease.loaded.nbytes == lease.entry.size

    @precondition(lambda self: not self.live)
    @invariant()
    def without_leases_only_ready_parts_are_left(self) -> None:
        counts = self.store.counts()
        assert (counts.leased, counts.guessed) == (0, 0)


TestStore = StoreMachine.TestCase


@pytest.mark.parametrize("eviction", ["lru", "s3-fifo", "score"])
def test_idle_parts_stay_until_room_is_needed(eviction: str) -> None:
    made = store(3, eviction)
    made.release(load(made, 1, 2, 3))
    assert made.counts().parts == 3
    made.release(load(made, 1, 2))
    assert (made.counts().decoded, made.counts().hits) == (3, 2)
    made.release(load(made, 4))
    assert (made.counts().parts, made.counts().evicted) == (3, 1)


def test_a_leased_part_is_not_evicted_and_a_guess_is_only_for_a_recall() -> None:
    made = store(2)
    leased = load(made, 1)
    guesses, _, _ = made.lease([2], torch.float32, guess=True)
    for entry in made.claim(guesses, made):
        made.settle(entry, loaded())
    assert made.lease([3], torch.float32, guess=True) == ([], [3], [])
    assert made.counts().wasted_bytes == 0
    third = load(made, 3)
    assert made.counts().wasted_bytes == FULL
    assert made.lease([4], torch.float32) == ([], [4], [])
    assert leased[0].loaded.nbytes == third[0].loaded.nbytes == FULL


def test_a_part_of_another_dtype_is_another_part() -> None:
    made = store(4)
    (one,) = load(made, 1)
    (other,), _, _ = made.lease([1], torch.float16)
    assert other.entry is not one.entry
    assert other.entry.size == FULL // 2


def test_a_part_larger_than_the_store_evicts_nothing() -> None:
    made = store(2)
    made.release(load(made, 1, 2, size=2))
    assert made.lease([3], torch.complex128) == ([], [3], [])
    assert made.counts().evicted == 0


def test_an_actual_part_counts_what_it_takes() -> None:
    made = store(2)
    leases = load(made, 1, size=2)
    assert made.counts().bytes == leases[0].loaded.nbytes == 2


def test_a_lease_that_is_dropped_gives_itself_back() -> None:
    made = store(1)
    load(made, 1)
    gc.collect()
    assert made.counts().leased == 0
    load(made, 2)


def test_a_lease_that_is_collected_under_the_lock_waits_for_nobody() -> None:
    made = store(2)
    leases = load(made, 1)
    with made._lock:  # a collection at any instruction of the store's own
        leases.clear()
        gc.collect()
    assert made.counts().leased == 0


def test_who_waits_gets_the_error_and_may_try_again() -> None:
    made = store(2)
    leases, _, _ = made.lease([1], torch.float32)
    entries = made.claim(leases, made)
    others, _, _ = made.lease([1], torch.float32)
    assert made.claim(others, made) == []
    made.fail(entries, made, TierError("gone"))
    with pytest.raises(TierError, match="gone"):
        others[0].entry.done.result()
    again = load(made, 1)
    assert again[0].loaded.nbytes == FULL
    made.release([*leases, *others])
    made.check_integrity()


def test_a_forgotten_part_is_read_to_the_end_and_never_found_again() -> None:
    made = store(2)
    (lease,) = load(made, 1)
    made.forget([1])
    assert lease.loaded.nbytes == FULL
    assert made.counts().bytes == FULL, "it still takes its bytes"
    (other,), _, _ = made.lease([1], torch.float32)
    assert other.entry is not lease.entry
    made.release([lease, other])
    assert made.counts().bytes == 0


def test_forgetting_reaches_a_load_under_way() -> None:
    made = store(2)
    (lease,), _, _ = made.lease([1], torch.float32)
    (entry,) = made.claim([lease], made)
    made.forget([1])
    made.settle(entry, loaded())
    assert entry.state == "gone"
    made.release([lease])
    assert made.counts().bytes == made.counts().parts == 0


def test_a_closed_store_leases_nothing_and_keeps_nobody_waiting() -> None:
    made = store(3)
    waiting, _, _ = made.lease([1], torch.float32)
    loading, _, _ = made.lease([2], torch.float32)
    (entry,) = made.claim(loading, made)
    made.close()
    made.close()
    with pytest.raises(TierClosedError):
        waiting[0].entry.done.result()
    with pytest.raises(TierClosedError):
        made.lease([3], torch.float32)
    made.settle(entry, loaded())
    made.release([*waiting, *loading])
    assert made.counts().bytes == 0


def test_an_unknown_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="eviction must be one of"):
        store(2, "random")


def test_threads_load_each_part_once_within_the_bound() -> None:
    made, decoded, lock = store(6), list[int](), threading.Lock()

    def work(number: int) -> None:
        for turn in range(40):
            ids = [(number + turn) % 5, turn % 5]
            leases, beyond, _ = made.lease(dict.fromkeys(ids), torch.float32)
            assert not beyond
            for entry in made.claim(leases, made):
                with lock:
                    decoded.append(entry.id)
                made.settle(entry, loaded())
            for lease in leases:
                lease.entry.done.result(timeout=60)
                assert lease.loaded.nbytes == FULL
            made.release(leases)

    together(4, work)
    made.check_integrity()
    assert sorted(decoded) == [0, 1, 2, 3, 4]
    assert made.counts().leased == 0


def test_waiters_in_other_threads_wake() -> None:
    made = store(1)
    leases, _, _ = made.lease([1], torch.float32)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(leases[0].entry.done.result, 60)
        made.settle(made.claim(leases, made)[0], loaded())
        assert waiting.result(timeout=60) is None
