import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from m3backends.lmdb.home import LmdbHome
from m3backends.slabs import PinnedTier
from m3runtime.errors import BankFullError, InputError, M3Error, TierClosedError, TierError
from m3runtime.storage.abilities import Persistent
from m3runtime.storage.home import Home
from m3runtime.storage.tier import CachingTier, Tier
from m3runtime.testing.blocks import (
    SLOT_BYTES,
    make_batch,
    make_blocks,
    make_embeddings,
    make_ids,
    make_reference,
    same_block,
)
from m3runtime.testing.faulty import KINDS, Fault, FaultyHome, FaultyTier, Injection, Kind, Schedule
from m3runtime.testing.slab import SlabTierContract
from m3runtime.testing.slow import SlowHome, SlowTier
from m3runtime.testing.tier import check_read, read, write
from m3runtime.testing.wrapping import Wrapped, WrappedHome, WrappedTier
from tests.backends.lmdb_contract import LmdbContract

ALWAYS = 1.0


def pinned(slots: int = 8) -> PinnedTier:
    return PinnedTier(slot_bytes=SLOT_BYTES, capacity=slots * SLOT_BYTES)


def faulty(*faults: Fault, seed: int = 0) -> FaultyTier:
    return FaultyTier(pinned(), Schedule(*faults, seed=seed))


def innermost(tier: Tier) -> Tier:
    return innermost(tier.inner) if isinstance(tier, Wrapped) else tier


class WrappedContract(SlabTierContract):
    """A wrapper that does nothing is not noticed."""

    def raw_read(self, tier: Tier, id: int) -> bytes | None:
        return super().raw_read(innermost(tier), id)

    def raw_write(self, tier: Tier, id: int, block: bytes) -> None:
        super().raw_write(innermost(tier), id, block)


class TestSlowAroundFaulty(WrappedContract):
    def make(self, *, slot_bytes: int, capacity: int) -> CachingTier:
        tier = FaultyTier(PinnedTier(slot_bytes=slot_bytes, capacity=capacity))
        tier.can_rot = False  # as long as nothing makes it
        return SlowTier(tier)


class TestFaultyAroundSlow(WrappedContract):
    def make(self, *, slot_bytes: int, capacity: int) -> CachingTier:
        schedule = Schedule(*(Fault(kind, rate=ALWAYS) for kind in KINDS))
        schedule.on = False
        tier = FaultyTier(SlowTier(PinnedTier(slot_bytes=slot_bytes, capacity=capacity)), schedule)
        tier.can_rot = False
        return tier


class TestFaultyHomeAroundSlow(LmdbContract):
    def open(self, folder: Path, *, read_only: bool = False) -> Home:
        return FaultyHome(SlowHome(LmdbHome(path=folder, slot_bytes=SLOT_BYTES, read_only=read_only)))

    def raw_read(self, tier: Tier, id: int) -> bytes | None:
        return super().raw_read(innermost(tier), id)

    def raw_write(self, tier: Tier, id: int, block: bytes) -> None:
        super().raw_write(innermost(tier), id, block)


class Lasting(PinnedTier):
    def ids(self) -> "np.typing.NDArray[np.uint64]":
        return np.array(sorted(self._held), np.uint64)


@pytest.mark.parametrize("wrap", [FaultyTier, SlowTier, WrappedTier, lambda tier: SlowTier(FaultyTier(tier))])
def test_a_wrapper_has_the_abilities_of_what_it_wraps(wrap: Callable[[CachingTier], CachingTier]) -> None:
    lasting = Lasting(slot_bytes=SLOT_BYTES, capacity=SLOT_BYTES)
    write(lasting, make_ids(7))
    tier = wrap(lasting)
    assert isinstance(tier, Persistent)
    assert tier.ids().tolist() == [7]
    assert not isinstance(wrap(pinned()), Persistent)
    assert (tier.name, tier.slot_bytes, tier.capacity, tier.device) == (
        "pinned",
        SLOT_BYTES,
        SLOT_BYTES,
        lasting.device,
    )


def test_a_wrapped_home_is_audited(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as home:
        home.commit(make_batch(make_ids(1)))
        found = list(home.audit())
        assert found  # its embeddings are not of length 1
        assert list(WrappedHome(home).audit()) == found


def damaged(tier: Tier, ids: "np.typing.NDArray[np.uint64]") -> list[int]:
    """The ids that are found with other bytes than theirs."""
    found, rows = read(tier, ids)
    assert found.all()
    return [int(id) for id, row, made in zip(ids, rows, make_blocks(ids), strict=True) if not same_block(row, made)]


@pytest.mark.parametrize("kind", ["bit_flip", "short_read", "stale", "other_id"])
def test_one_block_of_a_call_comes_back_wrong_and_is_noted(kind: Kind) -> None:
    tier, ids, other = faulty(Fault(kind, at={4, 8})), make_ids(1, 2, 3, 4), make_ids(9)
    write(tier, ids)
    write(tier, other)
    calls = [damaged(tier, ids) for _ in range(6) if check_read(tier, other).all()]
    assert [len(call) for call in calls] == [0, 1, 0, 1, 0, 0]
    assert tier.schedule.injected == tuple(Injection(kind, "read", id) for call in calls for id in call)
    assert check_read(tier.inner, ids).all()  # what it holds is whole


def test_stale_is_what_the_last_read_put_out_and_other_id_is_another_block() -> None:
    tier = faulty(Fault("stale", at={2}), Fault("other_id", at={3}))
    write(tier, make_ids(1, 2))
    for wanted, other in ((1, 1), (2, 1), (2, 1)):
        _, rows = read(tier, make_ids(wanted))
        assert same_block(rows[0], make_blocks(make_ids(other))[0])


def test_a_short_read_leaves_the_rest_of_the_row_as_it_was() -> None:
    tier = faulty(Fault("short_read", rate=ALWAYS))
    write(tier, make_ids(1))
    _, rows = read(tier, make_ids(1))
    right = make_blocks(make_ids(1))[0]
    cut = int((rows[0] != right).nonzero()[0])
    assert torch.equal(rows[0, :cut], right[:cut])
    assert bool((rows[0, cut:] == 0xEE).all())


@pytest.mark.parametrize("kind", ["torn_write", "bit_flip"])
def test_a_block_that_is_written_wrong_stays_wrong(kind: Kind) -> None:
    tier, ids = faulty(Fault(kind, at={1}, methods={"write"})), make_ids(1, 2, 3)
    blocks = make_blocks(ids)
    tier.write(ids, blocks)
    assert torch.equal(blocks, make_blocks(ids))  # the caller's own are not touched
    (wrong,) = damaged(tier, ids)
    assert damaged(tier.inner, ids) == [wrong]
    assert tier.schedule.injected == (Injection(kind, "write", wrong),)


def test_damage_that_changes_nothing_is_not_noted() -> None:
    tier = faulty(*(Fault(kind, rate=ALWAYS) for kind in ("stale", "other_id")))
    write(tier, make_ids(1))
    for _ in range(3):  # there is no other block, and the last read put out this one
        tier.schedule.set(Fault("other_id", rate=ALWAYS))
        assert damaged(tier, make_ids(1)) == []
    tier.schedule.set(Fault("stale", rate=ALWAYS), Fault("bit_flip", rate=ALWAYS))
    assert damaged(tier, make_ids(1)) == []
    assert check_read(tier, make_ids(5)).tolist() == [False]
    tier.read(make_ids(), torch.empty((0, SLOT_BYTES), dtype=torch.uint8))
    assert tier.schedule.injected == ()


CALLS: dict[str, Callable[[CachingTier], object]] = {
    "read": lambda tier: read(tier, make_ids(1)),
    "write": lambda tier: write(tier, make_ids(9)),
    "discard": lambda tier: tier.discard(make_ids(1)),
    "contains": lambda tier: tier.contains(make_ids(1)),
    "len": len,
}


@pytest.mark.parametrize("method", CALLS)
def test_an_error_does_nothing_and_a_lost_reply_did_all(method: str) -> None:
    for kind, done in (("error", False), ("lost_reply", True)):
        tier = faulty()
        write(tier, make_ids(1))
        tier.schedule.set(Fault(kind, at={1}))  # type: ignore[arg-type]
        with pytest.raises(TierError, match=f"tier pinned: {method} failed"):
            CALLS[method](tier)
        assert tier.schedule.injected == (Injection(kind, method),)  # type: ignore[arg-type]
        if method == "discard":
            assert (1 in tier.inner) != done
        if method == "write":
            assert (9 in tier.inner) == done
        CALLS[method](tier)


def test_only_the_chosen_methods_fail_and_only_while_it_is_on() -> None:
    tier = faulty(Fault("error", rate=ALWAYS, methods={"contains", "discard"}))
    write(tier, make_ids(1))
    assert check_read(tier, make_ids(1)).all()
    for method in ("contains", "discard"):
        with pytest.raises(TierError):
            CALLS[method](tier)
    tier.schedule.on = False
    tier.discard(make_ids(1))
    tier.schedule.on = True
    with pytest.raises(TierError):
        tier.discard(make_ids(1))
    tier.schedule.set()
    tier.discard(make_ids(1))
    assert len(tier.schedule.injected) == 3


def test_calls_are_counted_from_when_the_fault_was_set_while_it_is_on() -> None:
    tier = faulty()
    write(tier, make_ids(1))
    tier.schedule.set(Fault("error", at={2}, methods={"contains"}))
    assert 1 in tier
    tier.schedule.on = False
    assert 1 in tier
    tier.schedule.on = True
    with pytest.raises(TierError):
        tier.contains(make_ids(1))
    assert 1 in tier


def injections(seed: int) -> tuple[Injection, ...]:
    tier = faulty(Fault("bit_flip", rate=0.3), Fault("error", rate=0.1), Fault("torn_write", rate=0.5), seed=seed)
    for turn in range(60):
        try:
            write(tier, make_ids(turn, turn + 1))
            read(tier, make_ids(turn, turn + 1))
        except TierError:
            pass
    return tier.schedule.injected


def test_the_same_seed_gives_the_same_faults() -> None:
    assert injections(1) == injections(1) != injections(2)
    kinds = [injection.kind for injection in injections(1)]
    assert {"bit_flip", "error", "torn_write"} == set(kinds)
    assert 0 < kinds.count("bit_flip") < 60 * 0.6


def test_closing_fails_only_if_it_is_named_and_closes_all_the_same() -> None:
    tier = faulty(Fault("error", rate=ALWAYS))
    tier.close()
    with pytest.raises(TierClosedError):
        len(tier.inner)
    tier = faulty(Fault("error", rate=ALWAYS, methods={"close"}))
    with pytest.raises(TierError, match="close failed"):
        tier.close()
    with pytest.raises(TierClosedError):
        len(tier.inner)


def test_no_space(tmp_path: Path) -> None:
    tier = faulty(Fault("no_space", at={1}))
    with pytest.raises(TierError, match="no space"):
        write(tier, make_ids(1))
    assert len(tier) == 0
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as inner:
        home = FaultyHome(inner, Schedule(Fault("no_space", at={1})))
        with pytest.raises(BankFullError, match="no space"):
            home.commit(make_batch([1]))
        assert len(inner) == inner.next_id() == 0
        home.commit(make_batch([1]))
        assert home.schedule.injected == (Injection("no_space", "commit"),)


HOME_CALLS: dict[str, Callable[[Home], object]] = {
    "commit": lambda home: home.commit(make_batch([7])),
    "catalogue": lambda home: home.catalogue(make_ids(7), [make_reference(7)], make_embeddings(make_ids(7))),
    "cold": lambda home: home.cold(),
    "fill": lambda home: home.fill(make_ids(7), make_blocks(make_ids(7))),
    "next_id": lambda home: home.next_id(),
    "find": lambda home: home.find(["a"]),
    "references": lambda home: home.references(make_ids(1)),
    "ids": lambda home: home.ids(),
    "ids_of": lambda home: home.ids_of("a"),
    "sources": lambda home: home.sources(),
    "embeddings": lambda home: list(home.embeddings()),
    "quarantine": lambda home: home.quarantine(1, "bad"),
    "quarantined": lambda home: home.quarantined(),
    "get_meta": lambda home: home.get_meta("a"),
    "set_meta": lambda home: home.set_meta("a", b""),
    "stored_bytes": lambda home: home.stored_bytes(),
    "discard": lambda home: home.discard(make_ids(1)),
    "read": lambda home: read(home, make_ids(1)),
}


def test_every_call_of_a_home_may_fail_and_nothing_was_done(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as inner:
        inner.commit(make_batch([1]))
        home = FaultyHome(inner, Schedule(Fault("error", rate=ALWAYS)))
        for method, call in HOME_CALLS.items():
            with pytest.raises(TierError, match=f"tier lmdb: {method} failed"):
                call(home)
        assert [injection.method for injection in home.schedule.injected] == list(HOME_CALLS)
        assert inner.ids().tolist() == [1]
        assert inner.quarantined() == {}
        assert inner.get_meta("a") is None
        assert inner.cold().tolist() == []


def test_a_torn_commit_has_everything_but_one_block(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as inner:
        home = FaultyHome(inner, Schedule(Fault("torn_write", at={1})))
        home.commit(make_batch([1, 2, 3]))
        ((kind, method, id),) = [(one.kind, one.method, one.id) for one in home.schedule.injected]
        assert (kind, method) == ("torn_write", "commit")
        assert damaged(inner, make_ids(1, 2, 3)) == [id]
        assert inner.ids().tolist() == [1, 2, 3]


def test_a_torn_filling_has_everything_but_one_block(tmp_path: Path) -> None:
    with LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES) as inner:
        home, ids = FaultyHome(inner, Schedule(Fault("torn_write", at={2}))), make_ids(1, 2, 3)
        home.catalogue(ids, [make_reference(id) for id in ids.tolist()], make_embeddings(ids))
        assert home.schedule.injected == ()
        home.commit(make_batch([4]))
        assert home.fill(ids, make_blocks(ids)).all()
        ((kind, method, id),) = [(one.kind, one.method, one.id) for one in home.schedule.injected]
        assert (kind, method) == ("torn_write", "fill")
        assert damaged(inner, ids) == [id]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(InputError, match="bit_flip"):
        Fault("flip")  # type: ignore[arg-type]
    assert issubclass(InputError, M3Error)


def test_a_slow_tier_takes_its_latency_and_what_its_bandwidth_needs() -> None:
    slept: list[float] = []
    tier = SlowTier(pinned(), latency=0.5, bandwidth=2 * SLOT_BYTES, sleep=slept.append)
    write(tier, make_ids(1, 2, 3, 4))
    assert slept == [2.0, 0.5]
    slept.clear()
    assert check_read(tier, make_ids(1, 2, 9)).tolist() == [True, True, False]
    assert slept == [0.5, 1.0]  # what is missed is not carried
    slept.clear()
    tier.discard(make_ids(2))
    assert 1 in tier
    tier.close()
    assert slept == [0.5, 0.5]


def test_a_slow_home_takes_its_time_for_commits(tmp_path: Path) -> None:
    slept: list[float] = []
    inner = LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES)
    with SlowHome(inner, latency=0.25, bandwidth=SLOT_BYTES, sleep=slept.append) as home:
        home.commit(make_batch([1, 2]))
        assert check_read(home, make_ids(1, 2)).all()
    assert slept == [2.0, 0.25, 0.25, 2.0]
    slept.clear()
    with SlowHome(LmdbHome(path=tmp_path, slot_bytes=SLOT_BYTES), bandwidth=SLOT_BYTES, sleep=slept.append) as home:
        home.catalogue(make_ids(3), [make_reference(3)], make_embeddings(make_ids(3)))
        assert home.fill(make_ids(3), make_blocks(make_ids(3))).all()
    assert slept == [0.0, 1.0, 0.0]


def test_others_use_the_inner_tier_while_a_slow_one_sleeps() -> None:
    inner, seen = pinned(), list[int]()

    def sleep(_: float) -> None:
        other = threading.Thread(target=lambda: seen.append(len(inner)))
        other.start()
        other.join()

    tier = SlowTier(inner, latency=1, bandwidth=1, sleep=sleep)
    write(tier, make_ids(1))
    assert check_read(tier, make_ids(1)).all()
    assert seen == [0, 0, 1, 1]


def test_it_sleeps_by_the_clock_unless_told_otherwise() -> None:
    assert SlowTier(pinned()).sleep is time.sleep
