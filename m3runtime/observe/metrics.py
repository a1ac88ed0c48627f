"""`Metrics`: counters and latencies of a runtime; `Timeline`: its last events."""

import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from m3runtime.observe.latency import Latency, Timer
from m3runtime.observe.tiers import TierStats

RECALL_STAGES = ("embed", "search", "encode", "bring", "wait", "read", "decode", "deliver", "recall")
"""What a recall consists of. ``encode`` is that of cold references, or waiting while another thread encodes. ``bring``
has ``wait``, ``read`` and ``decode`` in it, and ``recall`` all the others."""
LOOKAHEAD_STAGES = ("embed", "search", "read", "decode", "lift")
"""What is done beside decoding, for hints and for blocks that missed a deadline."""


@dataclass(frozen=True, slots=True)
class RecallCounts:
    """What recall did so far. Each count only grows."""

    chunks: int = 0
    memories: int = 0
    """Memories given to chunks."""
    kept: int = 0
    """Of those, memories that the store held decoded already: neither read nor decoded."""
    late: int = 0
    """Memories that were chosen and had not arrived by the deadline, once for each chunk that went on without."""
    search_s: float = 0.0
    """Seconds spent on embedding and search."""
    fetch_s: float = 0.0
    """Seconds spent on waiting, reading and decoding."""
    waited_s: float = 0.0
    """Of those, seconds spent on waiting for what other threads were bringing."""
    encoded: int = 0
    """Cold references that were encoded at a recall."""
    unstored: int = 0
    """Of those, memories that the home had no room for."""
    encode_s: float = 0.0
    """Seconds spent on encoding them."""


@dataclass(frozen=True, slots=True)
class LookaheadCounts:
    """What hints led to so far. Each count only grows."""

    hints: int = 0
    cancelled: int = 0
    """Hints that a newer one or the recall overtook before their memories were asked for."""
    guesses: int = 0
    """Memories that hints asked for and that their stream did not lease."""
    hits: int = 0
    """Guesses that the next recall of their stream chose."""
    beyond: int = 0
    """Guesses without room in the store: only lifted."""
    failed: int = 0
    """Background work that failed."""
    last_error: str = ""

    @property
    def hit_rate(self) -> float:
        """Share of the guesses that were chosen; 0 if there were none."""
        return self.hits / self.guesses if self.guesses else 0.0


@dataclass(frozen=True, slots=True)
class StoreCounts:
    """The decoded memories of a device (`m3runtime.recall.store.MemoryStore`)."""

    capacity: int
    """Most bytes of parts."""
    bytes: int = 0
    """Bytes of parts now, those that are loading included."""
    parts: int = 0
    """Parts that are ready now."""
    leased: int = 0
    """Parts that recalls lease now."""
    guessed: int = 0
    """Parts that prefetches lease now."""
    decoded: int = 0
    """Memories decoded so far."""
    hits: int = 0
    """Leases of parts that were ready, so far."""
    evicted: int = 0
    """Parts that made room for others, so far."""
    wasted_bytes: int = 0
    """Bytes of parts that were decoded and removed before any recall leased them, so far."""


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
    recall_stages: Mapping[str, Latency]
    """By stage, see `RECALL_STAGES`: of each call of `Runtime.recall`, which streams that recall together share."""
    lookahead_stages: Mapping[str, Latency]
    """By stage, see `LOOKAHEAD_STAGES`."""
    tiers: tuple[TierMetrics, ...]
    """The tiers, fastest first, the home last."""


@dataclass(frozen=True, slots=True)
class Event:
    """A timed piece of work. ``start`` and ``end`` are values of `time.perf_counter`."""

    name: str
    """The name of a stage; names of background work begin with ``ahead.``."""
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
class Stages:
    """Times one recall, or one piece of background work, stage by stage. For one thread."""

    timers: Mapping[str, Timer]
    timeline: Timeline
    prefix: str = ""
    streams: tuple[int, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    """Seconds by stage so far."""

    @contextmanager
    def stage(self, name: str, blocks: int = 0) -> Iterator[None]:
        """Add the duration of the block to a stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            end = time.perf_counter()
            self.seconds[name] = self.seconds.get(name, 0.0) + end - start
            self.timeline.note(self.prefix + name, start, end, self.streams, blocks)

    def count(self) -> None:
        """Add the times of the stages to the latencies."""
        for name, seconds in self.seconds.items():
            self.timers[name].add(seconds)


class Meter:
    """Collects the latencies and the timeline of a runtime. Thread-safe."""

    def __init__(self, timeline: int = 0) -> None:
        self.timeline = Timeline(timeline)
        self._recall = {name: Timer() for name in RECALL_STAGES}
        self._lookahead = {name: Timer() for name in LOOKAHEAD_STAGES}

    def recall(self, streams: tuple[int, ...]) -> Stages:
        """The stages of one recall."""
        return Stages(self._recall, self.timeline, streams=streams)

    def lookahead(self, streams: tuple[int, ...] = ()) -> Stages:
        """The stages of background work."""
        return Stages(self._lookahead, self.timeline, "ahead.", streams)

    def latencies(self) -> tuple[dict[str, Latency], dict[str, Latency]]:
        """Latencies of recall and of background work, by stage."""
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
            self._counts = replace(
                self._counts, **{name: getattr(self._counts, name) + value for name, value in more.items()}
            )

    def snapshot(self) -> RecallCounts:
        """The current counts."""
        with self._lock:
            return self._counts
