"""`Metrics`: a snapshot of a runtime's counts and latencies; `Meter` and `Timeline` collect them."""

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from m3runtime.observe.counts import LookaheadCounts, RecallCounts, StoreCounts, TierStats, increased
from m3runtime.observe.latency import Latency, Timer

RECALL_PHASES = ("embed", "search", "encode", "bring", "wait", "read", "decode", "deliver", "recall")
"""The phases of a recall. ``encode`` is the time to encode cold references, or to wait for another thread that does.
``bring`` includes ``wait``, ``read`` and ``decode``; ``recall`` includes all others."""
LOOKAHEAD_PHASES = ("embed", "search", "read", "decode", "lift")
"""The phases of background work, for hints and for blocks that missed a deadline."""


@dataclass(frozen=True, slots=True)
class TierMetrics:
    """The metrics of one tier."""

    stats: TierStats
    read: Latency
    """Durations of calls that read from the tier."""
    blocks: int | None
    """Blocks in the tier now, or None if it cannot tell."""
    capacity: int | None
    """Capacity in bytes, or None for a tier without a bound."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """A snapshot of a runtime's counters and latencies."""

    recall: RecallCounts
    lookahead: LookaheadCounts
    store: StoreCounts
    recall_phases: Mapping[str, Latency]
    """By phase, see `RECALL_PHASES`: of each call of `Runtime.recall`, which streams that recall together share."""
    lookahead_phases: Mapping[str, Latency]
    """By phase, see `LOOKAHEAD_PHASES`."""
    tiers: tuple[TierMetrics, ...]
    """The tiers, fastest first, the home last."""


@dataclass(frozen=True, slots=True)
class Event:
    """A timed piece of work. ``start`` and ``end`` are values of `time.perf_counter`."""

    name: str
    """The name of a phase; names of background work begin with ``ahead.``."""
    start: float
    end: float
    thread: str
    streams: tuple[int, ...]
    """Numbers of the streams that the work was done for."""
    blocks: int = 0
    """Number of blocks."""


class Timeline:
    """The last ``most`` events; 0 keeps none. Thread-safe."""

    def __init__(self, most: int = 0) -> None:
        self.on = most > 0
        self._events: deque[Event] = deque(maxlen=most)  # appending to one is atomic

    def note(self, name: str, start: float, end: float, streams: tuple[int, ...] = (), blocks: int = 0) -> None:
        """Add an event of the calling thread, such as a decoding step of an engine."""
        if self.on:
            self._events.append(Event(name, start, end, threading.current_thread().name, streams, blocks))

    def events(self) -> tuple[Event, ...]:
        """The events, in the order in which they ended."""
        return tuple(self._events.copy())


@dataclass(slots=True)
class Phases:
    """Times one recall, or one piece of background work, phase by phase. For one thread."""

    timers: Mapping[str, Timer]
    timeline: Timeline
    prefix: str = ""
    streams: tuple[int, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by phase so far."""

    @contextmanager
    def phase(self, name: str, blocks: int = 0) -> Iterator[None]:
        """Add the duration of the block to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.seconds[name] = self.seconds.get(name, 0.0) + end - start
            self.timeline.note(self.prefix + name, start, end, self.streams, blocks)

    def count(self) -> None:
        """Add the times of the phases to the latencies."""
        for name, seconds in self.seconds.items():
            self.timers[name].add(seconds)


class Meter:
    """Collects the latencies and the timeline of a runtime. Thread-safe."""

    def __init__(self, timeline: int = 0) -> None:
        self.timeline = Timeline(timeline)
        self._recall = {name: Timer() for name in RECALL_PHASES}
        self._lookahead = {name: Timer() for name in LOOKAHEAD_PHASES}

    def recall(self, streams: tuple[int, ...]) -> Phases:
        """The phases of one recall."""
        return Phases(self._recall, self.timeline, streams=streams)

    def lookahead(self, streams: tuple[int, ...] = ()) -> Phases:
        """The phases of background work."""
        return Phases(self._lookahead, self.timeline, "ahead.", streams)

    def latencies(self) -> tuple[dict[str, Latency], dict[str, Latency]]:
        """Latencies of recall and of background work, by phase."""
        recall, lookahead = (
            {name: timer.latency() for name, timer in timers.items()} for timers in (self._recall, self._lookahead)
        )
        return recall, lookahead


class RecallStats:
    """Collects `RecallCounts`. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts = RecallCounts()

    def count(self, **more: float) -> None:
        """Increase counts, by name."""
        with self._lock:
            self._counts = increased(self._counts, **more)

    def snapshot(self) -> RecallCounts:
        """The current counts."""
        with self._lock:
            return self._counts
