"""Lookahead changes when memories are there, and nothing else."""

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from m3backends.slabs import PinnedTier
from m3runtime.errors import ConfigError, StoreFullError, TierClosedError, TierError
from m3runtime.recall.hints import with_owed
from m3runtime.recall.recalled import Recalled
from m3runtime.retrieval.match import Match
from m3runtime.runtime import Runtime
from m3runtime.storage.tier import CachingTier
from m3runtime.storage.trace import Op
from m3runtime.testing.faulty import Fault, FaultyHome, Schedule
from m3runtime.testing.recording import RecordingTier
from m3runtime.testing.slow import SlowHome, SlowTier
from tests.core.recalling import (
    BAD,
    PART_BYTES,
    TEXTS,
    WORDS,
    GatedHome,
    decoded_by,
    embedder_of,
    home_of,
    no_tiers,
    open_runtime,
    pinned,
    shut,
)

Open = Callable[..., Runtime]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    runtimes: list[Runtime] = []

    def open(name: str = "bank", **options: Any) -> Runtime:
        runtimes.append(open_runtime(tmp_path / name, wrap=options.pop("wrap", GatedHome), **options))
        return runtimes[-1]

    yield open
    for runtime in runtimes:
        if isinstance(runtime.bank.home, GatedHome):
            runtime.bank.home.gate.set()
        embedder_of(runtime).gate.set()
        runtime.close()


def drain(runtime: Runtime) -> None:
    assert runtime.background.drain(timeout=60)


def same(one: Recalled, other: Recalled) -> bool:
    """Whether they are equal to the last bit."""
    return (one.ids, one.scores, one.references, one.late, one.log_weights) == (
        (other.ids, other.scores, other.references, other.late, other.log_weights)
    ) and all(
        torch.equal(x, y)
        for mine, theirs in zip(one.parts, other.parts, strict=True)
        for x, y in zip(mine, theirs, strict=True)
    )


# -- what is recalled does not depend on it ---------------------------------------------------------------------------

texts = st.lists(st.sampled_from(WORDS), max_size=3).map(" ".join)
# What is hinted at before a recall, which may be nothing, and whether it has time; then the text of the recall.
chunks = st.lists(st.tuples(st.none() | texts, st.booleans(), texts), min_size=1, max_size=6)


@settings(max_examples=25)
@given(chunks=chunks, decoded=st.sampled_from([3, 4, 100]), slots=st.integers(0, 4))
def test_equal_memories_with_lookahead_on_and_off_and_without_tiers(
    tmp_path_factory: pytest.TempPathFactory, chunks: list[Any], decoded: int, slots: int
) -> None:
    folder = tmp_path_factory.mktemp("banks")
    with (
        open_runtime(folder / "on", tiers=pinned(slots), decoded=decoded * PART_BYTES) as on,
        open_runtime(folder / "off", tiers=no_tiers) as off,
        on.stream() as ahead,
        off.stream() as plain,
    ):
        for hinted, has_time, text in chunks:
            if hinted is not None:
                ahead.hint(hinted)
                if has_time:
                    drain(on)
            assert same(ahead.recall(text), plain.recall(text))
            assert on.metrics().store.guessed == 0 or not has_time
            assert on.metrics().store.bytes <= decoded * PART_BYTES
        drain(on)
        on.store.check_integrity()
        assert on.metrics().store.guessed == 0


@pytest.mark.parametrize("held", [True, False])
def test_what_another_process_forgot_is_recalled_no_more_after_the_next_hint(opened: Open, held: bool) -> None:
    runtime = opened(when_late="skip", deadline="10s")
    with runtime.stream() as stream:
        first = stream.recall("lamp oil harbour")
        if not held:
            stream.recall("winter island monday")
        runtime.bank.home.discard(np.array(first.ids[:1], np.uint64))  # behind the runtime's back
        stream.hint("lamp oil harbour")
        drain(runtime)
        assert stream.recall("lamp oil harbour").ids == first.ids[1:]


def test_a_hint_looks_for_changes_in_the_background_so_that_the_recall_need_not(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime, looked = opened(refresh="1000s"), list[int]()
    home = runtime.bank.home
    revision = home.revision

    def noted() -> int:
        looked.append(threading.get_ident())
        return revision()

    monkeypatch.setattr(home, "revision", noted)
    with runtime.stream() as stream:
        stream.hint("lamp oil harbour")
        drain(runtime)
        assert not looked
        runtime._refresh._looked -= 600  # it is time in 400 s
        gone = stream.recall("lamp oil harbour").ids[0]
        assert not looked
        home.discard(np.array([gone], np.uint64))
        stream.hint("lamp oil harbour")
        drain(runtime)
        assert len(looked) == 1
        assert looked[0] != threading.get_ident()
        assert gone not in stream.recall("lamp oil harbour").ids
        assert len(looked) == 1


def test_what_a_home_raises_in_the_background_is_raised_by_the_next_recall(
    opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = opened(refresh="1000s")

    def lost() -> int:
        raise TierError("the store is gone")

    with runtime.stream() as stream:
        stream.recall("lamp oil harbour")
        with monkeypatch.context() as patch:
            patch.setattr(runtime.bank.home, "revision", lost)
            runtime._refresh._looked -= 600
            stream.hint("lamp oil harbour")
            drain(runtime)
            with pytest.raises(TierError, match="the store is gone"):
                stream.recall("lamp oil harbour")
        assert stream.recall("lamp oil harbour").ids


def test_what_is_owed_and_found_under_another_id_is_recalled_once() -> None:
    assert with_owed([Match(9, 0.9, (7,))], [Match(7, 0.8), Match(5, 0.7)], 3) == [Match(9, 0.9, (7,)), Match(5, 0.7)]


def test_a_right_guess_leaves_nothing_to_read_or_decode(opened: Open) -> None:
    runtime, plain = opened(), opened("other")
    with runtime.stream() as stream, plain.stream() as other:
        stream.hint("lamp oil harbour")
        drain(runtime)
        read, decoded = list(home_of(runtime).asked), list(decoded_by(runtime))
        assert len(read) == 1
        assert decoded == [1, 1, 1]
        recalled = stream.recall("harbour lamp oil")  # other words in another order: the same memories
        assert same(recalled, other.recall("harbour lamp oil"))
        assert home_of(runtime).asked == read
        assert decoded_by(runtime) == decoded
        assert {"read", "decode", "wait"}.isdisjoint(recalled.phases)
        counts, stored = runtime.metrics().lookahead, runtime.metrics().store
        assert (counts.guesses, counts.hits, stored.wasted_bytes, stored.guessed) == (3, 3, 0, 0)
        assert counts.hit_rate == 1


def test_a_wrong_guess_is_dropped_and_counted_when_it_is_evicted(opened: Open) -> None:
    runtime = opened(decoded=6 * PART_BYTES)
    with runtime.stream() as stream:
        stream.hint("winter island")
        drain(runtime)
        held = runtime.metrics().store.bytes
        assert 0 < held <= 3 * PART_BYTES
        stream.recall("lamp harbour")
        counts, stored = runtime.metrics().lookahead, runtime.metrics().store
        assert (counts.guesses, counts.hits, stored.guessed, stored.wasted_bytes) == (3, 0, 0, 0)
        stream.recall("bridge walnut")  # makes room for itself
        assert runtime.metrics().store.wasted_bytes > 0


def test_what_the_stream_holds_is_not_guessed(opened: Open) -> None:
    runtime = opened()
    with runtime.stream() as stream:
        first = stream.recall("lamp harbour")
        stream.hint("lamp harbour")
        drain(runtime)
        assert runtime.metrics().lookahead.guesses == 0
        assert decoded_by(runtime) == [1, 1, 1]
        again = stream.recall("lamp harbour")
        assert again.parts[0][0] is first.parts[0][0]


def test_a_newer_hint_keeps_what_both_guessed(opened: Open) -> None:
    runtime = opened(memories=1)
    with runtime.stream() as stream:
        for text in (TEXTS[0], TEXTS[0], TEXTS[20]):
            stream.hint(text)
            drain(runtime)
        assert decoded_by(runtime) == [1, 1]
        assert runtime.metrics().store.guessed == 1


def test_a_text_that_was_hinted_at_is_not_embedded_again(opened: Open) -> None:
    runtime = opened()
    with runtime.stream() as one, runtime.stream() as other:
        runtime.hint([one, other], ["lamp", "ferry oil"])
        drain(runtime)
        runtime.recall([one, other], ["lamp", "ferry oil"])
        assert embedder_of(runtime).calls == [("lamp", "ferry oil")]
        runtime.recall([one], ["lamp"])  # beside another text, an embedder may have rounded otherwise
        assert embedder_of(runtime).calls == [("lamp", "ferry oil"), ("lamp",)]


def test_a_kept_memory_holds_no_bytes_but_its_own(opened: Open) -> None:
    runtime = opened()
    with runtime.stream() as stream:
        parts = [*stream.recall("lamp oil harbour").parts]
        stream.hint("winter island")
        drain(runtime)
        parts += stream.recall("winter island").parts
    assert len(parts) == 6
    for part in parts:
        for tensor in part:
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_what_is_decoded_in_inference_mode_serves_everybody(opened: Open) -> None:
    runtime = opened()
    with runtime.stream() as stream, torch.inference_mode():
        parts = stream.recall("lamp").parts
    assert not any(tensor.is_inference() for part in parts for tensor in part)


# -- bounds -----------------------------------------------------------------------------------------------------------


def test_a_guess_that_does_not_fit_is_only_lifted(opened: Open) -> None:
    runtime = opened(decoded=3 * PART_BYTES)
    with runtime.stream() as stream:
        stream.recall("winter island")
        stream.hint("lamp oil harbour")
        drain(runtime)
        counts = runtime.metrics().lookahead
        assert (counts.guesses, counts.beyond) == (3, 3)
        assert len(decoded_by(runtime)) == 3
        chosen = [match.id for match in runtime.search(["lamp oil harbour"])[0]]
        assert runtime.hierarchy.held(np.array(chosen, np.uint64)).all()
        asked = len(home_of(runtime).asked)
        assert len(stream.recall("lamp oil harbour")) == 3
        assert len(home_of(runtime).asked) == asked


def test_a_recall_without_room_says_what_to_set(opened: Open) -> None:
    runtime = opened(decoded=3 * PART_BYTES)
    with runtime.stream() as one, runtime.stream() as other:
        one.recall("lamp oil harbour")
        with pytest.raises(StoreFullError, match=r"recall\.decoded: no room for [123] memories"):
            other.recall("winter island")
        late = other.recall("winter island", wait=False)
        assert late.late
        assert len(late.ids + late.late) == 3
        one.close()
        assert len(other.recall("winter island")) == 3
    with pytest.raises(ConfigError, match=r"recall\.decoded: .* bytes do not hold the 3 memories of one chunk"):
        opened("small", decoded=2 * PART_BYTES).stream()


def test_a_recall_takes_the_room_of_a_guess_that_still_loads(opened: Open) -> None:
    """It waits for the load, since only a stream that reads its memories keeps them from a recall."""
    runtime = opened(decoded=3 * PART_BYTES, sections={"metrics": {"timeline": 100}})
    home = home_of(runtime)
    with runtime.stream() as one, runtime.stream() as other:
        with shut(home.gate):
            one.hint("lamp oil harbour")
            home.entered.acquire()
            thread, results = in_thread(lambda: other.recall("winter island"))
            while not any(event.name == "search" and other.number in event.streams for event in runtime.timeline()):
                pass
        thread.join()
        assert len(results[0]) == 3
        assert runtime.metrics().store.bytes <= 3 * PART_BYTES


# -- nobody brings what another is bringing ---------------------------------------------------------------------------


@contextmanager
def at_line(file: str, moment: int, work: Callable[[], None]) -> Iterator[list[int]]:
    """Do the work before the ``moment``-th line of this file that the block runs. What it yields is empty then."""
    left = [moment]

    def trace(frame: FrameType, event: str, _: object) -> object:
        if not frame.f_code.co_filename.endswith(file):
            return None
        if event == "line" and left:
            left[0] -= 1
            if not left[0]:
                left.clear()
                work()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield left
    finally:
        sys.settrace(before)


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    return thread, results


def test_a_recall_waits_for_the_guess_that_is_under_way(opened: Open) -> None:
    runtime = opened()
    home = home_of(runtime)
    with runtime.stream() as stream:
        with shut(home.gate):
            stream.hint("lamp oil harbour")
            home.entered.acquire()
            thread, results = in_thread(lambda: stream.recall("harbour oil lamp"))
            while runtime.metrics().store.leased < 3:
                pass
        thread.join()
        assert len(results[0]) == 3
        assert results[0].phases["wait"] > 0
        assert len(home.asked) == 1
        assert decoded_by(runtime) == [1, 1, 1]
        assert runtime.metrics().recall.waited_s > 0


def test_two_recalls_of_one_memory_read_and_decode_it_once(opened: Open) -> None:
    ops: list[Op] = []

    def tiers(slot_bytes: int) -> list[CachingTier]:
        return [RecordingTier(tier, ops.append) for tier in pinned(6)(slot_bytes)]

    runtime = opened(tiers=tiers)
    home = home_of(runtime)
    with runtime.stream() as one, runtime.stream() as other:
        with shut(home.gate):
            first, got = in_thread(lambda: one.recall("lamp oil harbour"))
            home.entered.acquire()
            second, also = in_thread(lambda: other.recall("harbour oil lamp"))
            while len(embedder_of(runtime).calls) < 2:
                pass
        first.join()
        second.join()
        assert same(got[0], also[0])
        assert got[0].parts[0][0] is also[0].parts[0][0]
        assert decoded_by(runtime) == [1, 1, 1]
        assert len(home.asked) == 1
        assert [len(op.ids) for op in ops if op.op == "read"] == [3]
    runtime.store.check_integrity()
    assert runtime.metrics().store.leased == 0


def test_two_streams_that_guess_one_memory_share_it(opened: Open) -> None:
    runtime = opened(memories=1)
    with runtime.stream() as one, runtime.stream() as other:
        runtime.hint([one, other], [TEXTS[3], TEXTS[3]])
        drain(runtime)
        assert decoded_by(runtime) == [1]
        first = one.recall(TEXTS[3])
        assert runtime.metrics().store.guessed == 1  # for the other one
        assert other.recall(TEXTS[3]).parts[0][0] is first.parts[0][0]
        counts, stored = runtime.metrics().lookahead, runtime.metrics().store
        assert (counts.guesses, counts.hits, stored.guessed, stored.decoded) == (2, 2, 0, 1)


def test_a_hint_that_waits_is_overtaken_by_a_newer_one_and_by_the_recall(opened: Open) -> None:
    runtime = opened(sections={"threads": {"lookahead": 1}})
    embedder = embedder_of(runtime)
    with runtime.stream() as busy, runtime.stream() as stream:
        with shut(embedder.gate):
            busy.hint("lamp")
            embedder.entered.acquire()
            stream.hint("ferry")
            stream.hint("market")
            thread, _ = in_thread(lambda: stream.recall("bridge"))
            embedder.entered.acquire()
            assert runtime.metrics().lookahead.cancelled == 2
        thread.join()
        drain(runtime)
        assert embedder.calls == [("lamp",), ("bridge",)]


def test_a_hint_whose_recall_came_first_brings_nothing(opened: Open) -> None:
    runtime = opened()
    embedder = embedder_of(runtime)
    with runtime.stream() as stream:
        stream.recall("bridge")
        with shut(embedder.gate):
            stream.hint("lamp")
            embedder.entered.acquire()
            embedder.entered.acquire()
            stream.recall(" ")  # embeds nothing
        drain(runtime)
        counts = runtime.metrics().lookahead
        assert (counts.cancelled, counts.guesses, runtime.metrics().store.guessed) == (1, 0, 0)


def test_a_stream_that_ends_takes_its_guesses_along(opened: Open) -> None:
    runtime = opened()
    with runtime.stream() as stream:
        stream.hint("lamp oil")
        drain(runtime)
        assert runtime.metrics().store.guessed > 0
    assert runtime.metrics().store.guessed == 0


@pytest.mark.parametrize("recalled", [True, False])
def test_a_stream_that_is_dropped_gives_everything_back(recalled: bool, opened: Open) -> None:
    runtime = opened()
    stream = runtime.stream()
    if recalled:
        stream.recall("lamp oil")
    stream.hint("winter island")
    drain(runtime)
    assert runtime.metrics().store.guessed > 0
    assert (runtime.metrics().store.leased > 0) == recalled
    del stream
    gc.collect()
    stored = runtime.metrics().store
    assert (stored.leased, stored.guessed) == (0, 0)
    runtime.store.check_integrity()


# -- deadlines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when_late", ["skip", "next_chunk"])
@pytest.mark.parametrize("tiers", [pinned(6), no_tiers], ids=["tier", "no tier"])
def test_what_a_hint_is_still_bringing_is_late_once(when_late: str, tiers: Any, opened: Open) -> None:
    runtime = opened(when_late=when_late, deadline=0.01, memories=1, tiers=tiers)
    home = home_of(runtime)
    with runtime.stream() as stream:
        with shut(home.gate):
            stream.hint(TEXTS[3])
            home.entered.acquire()
            recalled = stream.recall(TEXTS[3])
            assert (recalled.ids, recalled.late) == ((), (3,))
        drain(runtime)
        assert runtime.metrics().store.guessed == 1  # it is ready for the next chunk
        later = stream.recall(" ")
        assert later.ids == ((3,) if when_late == "next_chunk" else ())
        assert later.late == ()
        assert len(home.asked) == 1
        counts = runtime.metrics()
        assert (counts.recall.late, counts.store.guessed) == (1, 0)


@pytest.mark.parametrize("tiers", [pinned(6), no_tiers], ids=["tier", "no tier"])
def test_decoding_goes_on_without_what_lies_below_and_with_what_is_near(tiers: Any, opened: Open) -> None:
    runtime = opened(when_late="skip", deadline=0.01, memories=2, tiers=tiers)
    home = home_of(runtime)
    with runtime.stream() as stream, runtime.stream() as other:
        near = other.recall(TEXTS[3], wait=True).ids
        far = runtime.search([TEXTS[20]])[0][0].id
        assert far not in near
        with shut(home.gate):
            recalled = stream.recall(f"{TEXTS[3]} {TEXTS[20]}")
            wanted = {match.id for match in runtime.search([f"{TEXTS[3]} {TEXTS[20]}"])[0]}
            there = wanted.intersection(near)  # `other` leases them, whatever the tiers hold
            assert set(recalled.ids) == there
            assert set(recalled.late) == wanted - there
        drain(runtime)
        assert set(stream.recall(f"{TEXTS[3]} {TEXTS[20]}", wait=True).ids) == wanted


def test_a_prompt_waits_whatever_is_late(opened: Open) -> None:
    runtime = opened(when_late="skip", deadline=0.0)
    home = home_of(runtime)
    with runtime.stream() as stream:
        with shut(home.gate):
            stream.hint("lamp oil")
            home.entered.acquire()
            thread, results = in_thread(lambda: stream.recall("lamp oil", wait=True))
        thread.join()
        assert len(results[0]) == 3
        assert results[0].late == ()


def test_what_arrives_at_the_deadline_is_delivered_or_late(opened: Open) -> None:
    """Whatever a recall was doing then."""
    runtime = opened(when_late="skip", deadline=0.0, tiers=no_tiers)
    chosen = {match.id for match in runtime.search(["lamp oil harbour"])[0]}

    def arrive() -> None:
        home_of(runtime).gate.set()
        drain(runtime)

    moment, left, delivered = 0, list[int](), set[int]()
    while not left:
        moment += 1
        runtime.store.forget(chosen)
        home_of(runtime).gate.clear()
        with runtime.stream() as stream:
            with at_line("delivery.py", moment, arrive) as left:
                recalled = stream.recall("lamp oil harbour")
            arrive()
        assert {*recalled.ids, *recalled.late} == chosen, moment
        delivered.add(len(recalled))
    assert delivered >= {0, 3}


def test_a_load_that_another_recall_failed_is_tried_again(opened: Open) -> None:
    """Its error, which may be an interrupt of another thread, is none of this recall."""
    runtime = opened()
    chosen = [match.id for match in runtime.search(["lamp oil harbour"])[0]]
    store = runtime.store

    def fail() -> None:
        leases, _, _ = store.lease(chosen, torch.float32)
        store.fail(store.claim(leases, fail), fail, KeyboardInterrupt())
        store.release(leases)

    moment, left = 0, list[int]()
    while not left:
        moment += 1
        store.forget(chosen)
        with runtime.stream() as stream, at_line("delivery.py", moment, fail) as left:
            assert list(stream.recall("lamp oil harbour").ids) == chosen, moment
    store.check_integrity()


def test_a_late_memory_that_cannot_be_loaded_leaves_nothing_for_the_next_chunk(opened: Open) -> None:
    """Its load fails between the deadline and the end of the recall."""

    class Scored(PinnedTier):
        def score(self, ids: Any, scores: Any) -> None:
            home_of(runtime).gate.set()
            drain(runtime)

    fails = Schedule(Fault("error", at={1}, methods={"read"}))
    runtime = opened(
        when_late="next_chunk",
        deadline=0.0,
        memories=1,
        wrap=lambda home: GatedHome(FaultyHome(home, fails)),
        tiers=lambda slot_bytes: [Scored(slot_bytes=slot_bytes, capacity=slot_bytes)],
    )
    with runtime.stream() as stream:
        home_of(runtime).gate.clear()
        assert stream.recall(TEXTS[3]).late == (3,)
        drain(runtime)
        stored = runtime.metrics().store
        assert (stored.guessed, stored.bytes) == (0, 0)
        assert stream.recall(" ", wait=True).ids == (3,)


@pytest.mark.parametrize("below", ["tier", "home"])
def test_slow_storage_is_late_at_a_deadline_of_nothing_and_in_time_at_a_long_one(below: str, opened: Open) -> None:
    slow: list[SlowTier] = []

    def tiers(slot_bytes: int) -> list[CachingTier]:
        slow.append(SlowTier(PinnedTier(slot_bytes=slot_bytes, capacity=30 * slot_bytes)))
        return [*pinned(1)(slot_bytes), *(slow if below == "tier" else [])]

    runtime = opened(when_late="skip", deadline=0.0, memories=1, tiers=tiers, wrap=SlowHome, decoded=PART_BYTES)
    with runtime.stream() as stream:
        chosen = stream.recall(TEXTS[3], wait=True)
        for other in (TEXTS[20], TEXTS[10]):
            stream.recall(other, wait=True)  # takes the only place in the store and in the fastest tier
        home = runtime.bank.home
        assert isinstance(home, SlowHome)
        (slow[0] if below == "tier" else home).latency = 0.3
        late = stream.recall(TEXTS[3])
        assert set(late.late) == set(chosen.ids)
        drain(runtime)
        assert stream.recall(TEXTS[3]).ids == chosen.ids
    patient = opened(
        "patient", when_late="skip", deadline=60.0, memories=1, wrap=lambda home: SlowHome(home, latency=0.01)
    )
    with patient.stream() as stream:
        assert (stream.recall(TEXTS[3]).ids, patient.metrics().recall.late) == (chosen.ids, 0)


# -- faults -----------------------------------------------------------------------------------------------------------


def faulty(*faults: Fault) -> Callable[[Any], FaultyHome]:
    return lambda home: FaultyHome(home, Schedule(*faults))


def test_a_guess_that_fails_is_counted_and_the_recall_tries_again(opened: Open) -> None:
    runtime = opened(wrap=faulty(Fault("error", at={1}, methods={"read"})))
    with runtime.stream() as stream:
        stream.hint("lamp oil")
        drain(runtime)
        counts = runtime.metrics().lookahead
        assert (counts.failed, runtime.metrics().store.guessed) == (1, 0)
        assert "read failed" in counts.last_error
        assert len(stream.recall("lamp oil")) == 3


@pytest.mark.parametrize("when_late", ["wait", "skip"])
def test_a_recall_that_fails_raises_and_the_next_one_works(when_late: str, opened: Open) -> None:
    fault = Fault("error", at={2}, methods={"read"})
    runtime = opened(wrap=faulty(fault), when_late=when_late, deadline=60.0, tiers=pinned(1))
    with runtime.stream() as stream:
        first = stream.recall("lamp oil harbour")
        with pytest.raises(TierError, match="read failed"):
            stream.recall("winter island")
        assert stream.recall("lamp oil harbour").parts[0][0] is first.parts[0][0]
        assert len(stream.recall("winter island")) == 3
        assert runtime.metrics().store.leased == 3
        runtime.store.check_integrity()


def test_one_bad_hint_is_the_only_one_that_fails(opened: Open) -> None:
    runtime = opened()
    with runtime.stream() as one, runtime.stream() as other:
        runtime.hint([one, other], [BAD, "lamp oil"])
        drain(runtime)
        counts = runtime.metrics().lookahead
        assert (counts.failed, counts.guesses) == (1, 3)
        assert "cannot be embedded" in counts.last_error


def test_an_error_in_the_background_is_no_other_streams_error(
    opened: Open, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = opened()
    with runtime.stream() as unlucky, runtime.stream() as other:
        with monkeypatch.context() as patch:
            patch.setattr(runtime.bank.codec, "decode", lambda *_: 1 / 0)
            unlucky.hint("lamp oil")
            drain(runtime)
        assert runtime.metrics().lookahead.failed == 1
        assert "ZeroDivisionError" in caplog.text
        other.hint("winter island")
        drain(runtime)
        assert len(other.recall("winter island")) == 3
        assert len(unlucky.recall("lamp oil")) == 3
        assert runtime.metrics().lookahead.failed == 1


def test_what_is_forgotten_while_it_is_read_is_counted_and_recalled_no_more(opened: Open) -> None:
    """By another process, after its references were read: then nothing is left to deliver, and nothing was kept."""
    runtime = opened()
    home = home_of(runtime)
    chosen = [match.id for match in runtime.search(["lamp oil harbour"])[0]]
    with runtime.stream() as stream:
        with shut(home.gate):
            thread, results = in_thread(lambda: stream.recall("lamp oil harbour"))
            home.entered.acquire()
            runtime.bank.home.discard(np.array(chosen, np.uint64))
        thread.join()
        assert results[0].ids == ()
        assert runtime.metrics().recall.kept == 0
        assert runtime.metrics().store.bytes == 0


def test_a_reference_that_is_forgotten_while_it_is_loaded_is_not_put_back(opened: Open) -> None:
    runtime = opened(memories=1, when_late="skip", deadline=60.0)
    home = home_of(runtime)
    with runtime.stream() as stream, runtime.stream() as other:
        with shut(home.gate):
            stream.hint(TEXTS[3])
            home.entered.acquire()
            assert runtime.forget([3]) == 1
        drain(runtime)
        assert runtime.metrics().store.parts == 0
        assert 3 not in other.recall(TEXTS[3]).ids


@pytest.mark.parametrize("when_late", ["wait", "skip"])
def test_a_mistake_is_raised_once_by_the_recall_that_waits_for_it(
    when_late: str, opened: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = opened(when_late=when_late, deadline=60.0, tiers=no_tiers)
    with runtime.stream() as stream:
        with monkeypatch.context() as patch:
            patch.setattr(runtime.bank.codec, "decode", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                stream.recall("lamp oil")
        assert len(stream.recall("lamp oil")) == 3


def test_a_closed_runtime_takes_no_hints_and_leaves_no_thread(opened: Open) -> None:
    runtime = opened()
    home = home_of(runtime)
    stream = runtime.stream()
    with shut(home.gate):
        stream.hint("lamp oil")
        home.entered.acquire()
        thread, _ = in_thread(runtime.close)
    thread.join()
    with pytest.raises(TierClosedError):
        stream.hint("lamp oil")
    with pytest.raises(TierClosedError):
        stream.recall("lamp oil")
    assert not [one.name for one in threading.enumerate() if one.name.startswith("m3-")]
    stream.close()


# -- on a GPU ---------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("decoded", [3 * PART_BYTES, 100 * PART_BYTES])
def test_equal_memories_with_and_without_lookahead_on_a_gpu(decoded: int, opened: Open) -> None:
    runtime, plain = opened(device="cuda", decoded=decoded), opened("other", device="cuda", tiers=no_tiers)
    with runtime.stream() as stream, plain.stream() as other, torch.cuda.stream(torch.cuda.Stream()):
        for at in range(20):
            text = f"{WORDS[at % 12]} {WORDS[at * 5 % 12]}"
            stream.hint(text)
            if at % 3:
                drain(runtime)
            one, two = stream.recall(text), other.recall(text)
            assert same(one, two)
            assert one.parts[0][0].device.type == "cuda"
            for part in one.parts:
                for tensor in part:
                    assert tensor.untyped_storage().nbytes() == tensor.nbytes
