"""Hints, recalls, faults and endings of three streams in any order, against a runtime without lookahead."""

import gc
import tempfile
import threading
from pathlib import Path

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from m3runtime.errors import TierError
from m3runtime.recall.recalled import Recalled
from m3runtime.testing.faulty import Fault, FaultyHome
from tests.core.recalling import (
    PART_BYTES,
    WORDS,
    GatedHome,
    decoded_by,
    no_tiers,
    open_runtime,
    pinned,
)

streams = st.integers(0, 2)
texts = st.lists(st.sampled_from(WORDS), max_size=3).map(" ".join)


class LookaheadMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory(prefix="m3-lookahead-")
        self.is_shut = False

    @initialize(
        decoded=st.sampled_from([9 * PART_BYTES, 10 * PART_BYTES, 100 * PART_BYTES]),
        slots=st.integers(0, 4),
        threads=st.integers(1, 3),
        when_late=st.sampled_from(["skip", "next_chunk"]),
    )
    def open(self, decoded: int, slots: int, threads: int, when_late: str) -> None:
        folder = Path(self.temporary.name)
        self.gates: list[threading.Event] = []

        def wrap(home: object) -> FaultyHome:
            self.gated = GatedHome(home)  # type: ignore[arg-type]
            self.faulty = FaultyHome(self.gated)
            return self.faulty

        self.runtime = open_runtime(
            folder / "on",
            tiers=pinned(slots),
            wrap=wrap,
            decoded=decoded,
            when_late=when_late,
            deadline=0.001,
            sections={"threads": {"lookahead": threads}},
        )
        self.plain = open_runtime(folder / "off", tiers=no_tiers)
        self.streams = [self.runtime.stream() for _ in range(3)]
        self.late = 0

    def teardown(self) -> None:
        if hasattr(self, "runtime"):
            self.gated.gate.set()
            self.faulty.schedule.set()
            self.drain()
            for stream in self.streams:
                stream.close()
            self.drain()
            gc.collect()  # dropped streams may be in the traceback of an error that was injected
            self.runtime.store.check_integrity()
            stored = self.runtime.metrics().store
            assert (stored.leased, stored.guessed) == (0, 0)
            self.runtime.close()
            self.plain.close()
        self.temporary.cleanup()

    def drain(self) -> None:
        assert self.runtime.background.drain(timeout=60)

    @rule(stream=streams, text=texts, both=st.booleans())
    def hint(self, stream: int, text: str, both: bool) -> None:
        if both:
            others = [self.streams[stream], self.streams[(stream + 1) % 3]]
            self.runtime.hint(others, [text, WORDS[stream]])
        else:
            self.streams[stream].hint(text)

    @precondition(lambda self: not self.is_shut)
    @rule(stream=streams, text=texts)
    def recall_and_wait(self, stream: int, text: str) -> None:
        """All that is chosen comes, whatever was hinted at, and it is the same without lookahead."""
        owed = [match.id for match in self.streams[stream].state.owed]
        try:
            recalled = self.streams[stream].recall(text, wait=True)
        except TierError:
            assert self.faulty.schedule.injected
            return
        assert recalled.late == ()
        if not owed:
            with self.plain.stream() as plain:
                expected = plain.recall(text)
            assert (recalled.ids, recalled.scores) == (expected.ids, expected.scores)
            self.check(recalled, expected)
            assert recalled.log_weights == expected.log_weights

    @rule(stream=streams, text=texts)
    def recall_by_the_deadline(self, stream: int, text: str) -> None:
        """Each memory that is chosen is delivered, and right, or late; what the stream holds is never late."""
        held = set(self.streams[stream].state.leases)
        owed = [match.id for match in self.streams[stream].state.owed]
        try:
            recalled = self.streams[stream].recall(text)
        except TierError:
            assert self.faulty.schedule.injected
            return
        self.late += len(recalled.late)
        assert held.isdisjoint(recalled.late)
        with self.plain.stream() as plain:
            expected = plain.recall(text)
        if not owed:
            assert sorted(recalled.ids + recalled.late) == sorted(expected.ids)
            self.check(recalled, expected)

    def check(self, recalled: Recalled, expected: Recalled) -> None:
        right = dict(zip(expected.ids, expected.parts, strict=True))
        for id, part in zip(recalled.ids, recalled.parts, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(part, right[id], strict=True))

    @rule(stream=streams, closed=st.booleans())
    def end(self, stream: int, closed: bool) -> None:
        """Closed, or only dropped."""
        if closed:
            self.streams[stream].close()
        self.streams[stream] = self.runtime.stream()

    @rule()
    def let_it_end(self) -> None:
        if not self.is_shut:
            self.drain()

    @rule()
    def shut(self) -> None:
        """The home hangs."""
        self.gated.gate.clear()
        self.is_shut = True

    @precondition(lambda self: self.is_shut)
    @rule()
    def unshut(self) -> None:
        self.gated.gate.set()
        self.is_shut = False

    @rule(at=st.integers(1, 3))
    def fail(self, at: int) -> None:
        """One reading of the home fails."""
        self.faulty.schedule.set(Fault("error", at={at}, methods={"read"}))

    @invariant()
    def decoded_memories_stay_within_the_bound(self) -> None:
        if hasattr(self, "runtime"):
            counts = self.runtime.metrics()
            assert 0 <= counts.store.bytes <= counts.store.capacity
            assert counts.recall.late == self.late
            assert counts.lookahead.hits <= counts.lookahead.guesses
            self.runtime.store.check_integrity()
            assert set(decoded_by(self.runtime)) <= {1}


TestLookahead = LookaheadMachine.TestCase
TestLookahead.settings = settings(max_examples=max(25, settings.default.max_examples // 4), stateful_step_count=25)
