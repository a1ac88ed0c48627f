"""`Arrivals`: every memory that is being brought, so that nobody brings it a second time."""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial

import torch

from m3runtime.device.side_stream import SideStream
from m3runtime.errors import M3Error
from m3runtime.memory.block import as_ids
from m3runtime.observe.metrics import Meter, Stages
from m3runtime.recall.fetching import Fetcher
from m3runtime.recall.prefetch import Prefetcher
from m3runtime.stream import Part


@dataclass(eq=False, slots=True)
class Arrival:
    """One memory that is wanted, under way, or ready."""

    id: int
    dtype: torch.dtype
    size: int
    """Bytes that it takes; before it is decoded, the most that it may."""
    part: "Future[Part | None]" = field(default_factory=Future)
    """None: it is gone, or its block is bad."""
    event: torch.Event | None = None
    begun: bool = False
    guessers: set[int] = field(default_factory=set)
    waiters: int = 0
    is_reserved: bool = False
    """Whether its size counts as in flight."""
    is_used: bool = False

    @property
    def is_wanted(self) -> bool:
        """Whether a stream guessed it, or a recall waits for it."""
        return bool(self.guessers or self.waiters)


@dataclass(frozen=True, slots=True)
class Gathered:
    """What `Arrivals.gather` brought."""

    parts: Mapping[int, Part]
    late: frozenset[int]


class Arrivals:
    """Memories that are wanted, under way or ready, by id and dtype: for a recall, which waits, or as guesses.

    Guesses, ready or under way, take at most ``in_flight`` bytes over all streams. What nobody wants any more is let go
    of: at once, or when it is there if its block is already being read.

    No lock is held while anything is read or decoded. Thread-safe.
    """

    def __init__(self, fetcher: Fetcher, prefetcher: Prefetcher, meter: Meter, *, in_flight: int) -> None:
        self.in_flight = in_flight
        self._fetcher = fetcher
        self._prefetcher = prefetcher
        self._meter = meter
        self._side = SideStream(fetcher.device)
        self._lock = threading.Lock()
        self._there: dict[tuple[int, torch.dtype], Arrival] = {}
        self._guesses: dict[int, set[Arrival]] = {}  # by stream
        self._in_flight = self._wasted = 0

    @property
    def in_flight_bytes(self) -> int:
        """Bytes of guesses now."""
        with self._lock:
            return self._in_flight

    @property
    def wasted_bytes(self) -> int:
        """Bytes of guesses that were decoded and never used, so far."""
        with self._lock:
            return self._wasted

    # -- guesses ------------------------------------------------------------------------------------------------

    def guess(self, owner: int, ids: Iterable[int], dtype: torch.dtype) -> tuple[list[Arrival], list[int]]:
        """Take these for the guesses of the stream ``owner``.

        Returns those that are to be brought, by `bring` in the prefetcher, and the ids that there is no room for.
        """
        new: list[Arrival] = []
        beyond: list[int] = []
        with self._lock:
            for id in ids:
                arrival = self._there.get((id, dtype))
                if arrival is not None:
                    self._reserve(arrival, owner)
                    continue
                arrival = Arrival(id, dtype, self._fetcher.part_bytes(dtype))
                if self._reserve(arrival, owner):
                    self._there[id, dtype] = arrival
                    new.append(arrival)
                else:
                    beyond.append(id)
        return new, beyond

    def drop(self, owner: int, keep: Collection[int] = ()) -> None:
        """Of what ``owner`` guessed, only ``keep`` is wanted."""
        with self._lock:
            kept = set[Arrival]()
            for arrival in self._guesses.pop(owner, ()):
                if arrival.id in keep:
                    kept.add(arrival)
                else:
                    arrival.guessers.discard(owner)
                    self._tidy(arrival)
            if kept:
                self._guesses[owner] = kept

    def submit(self, arrivals: Sequence[Arrival], work: Callable[[], None], *, urgent: bool = False) -> None:
        """Let the prefetcher do ``work``, which brings these. Called without a lock. Raises as `Prefetcher.hint`."""
        try:
            future = self._prefetcher.hint(object(), work, urgent=urgent)
        except BaseException:
            self._abandon(arrivals)
            raise
        future.add_done_callback(lambda done: self._abandon(arrivals) if done.cancelled() else None)

    def bring(self, arrivals: Iterable[Arrival], stages: Stages) -> list[Arrival]:
        """Read and decode those that are still wanted, beside whatever else the device does. Returns which those are.

        Their part then has what was raised, too.
        """
        with self._lock:
            mine = [arrival for arrival in arrivals if not arrival.begun and arrival.is_wanted]
            for arrival in mine:
                arrival.begun = True
        self._bring(mine, stages, aside=True)
        return mine

    # -- recalls ------------------------------------------------------------------------------------------------

    def gather(
        self,
        chosen: Mapping[int, Collection[int]],
        ids: Sequence[int],
        dtype: torch.dtype,
        stages: Stages,
        deadline: float | None,
    ) -> Gathered:
        """The parts of ``ids``, each once; those that are gone or bad are left out.

        What is ready is taken, and what others are bringing is waited for. The rest is brought by the calling thread;
        with a ``deadline`` (of `time.perf_counter`) only what the fastest tier has: what lies below is brought by the
        prefetcher, and not waited for any longer. What is late becomes a guess of the streams that it was ``chosen``
        for.
        """
        parts: dict[int, Part] = {}
        late: set[int] = set()
        claimed: list[Arrival] = []
        missing = list(ids)
        try:
            while missing:
                own, theirs = self._claim(missing, dtype)
                claimed += own + theirs
                try:
                    below = [] if deadline is None or not own else self._below(own)
                    if below:
                        self.submit(below, partial(self._bring_below, below, tuple(chosen)), urgent=True)
                    own = [arrival for arrival in own if arrival not in below]
                    self._bring(own, stages, aside=False)
                except BaseException as error:
                    self._fail([arrival for arrival in own if arrival.begun], error)  # or others would wait for them
                    raise
                others = theirs + below
                if not all(arrival.part.done() for arrival in others):
                    left = None if deadline is None else max(0.0, deadline - time.perf_counter())
                    with stages.stage("wait", len(others)):
                        wait([arrival.part for arrival in others], left)
                missing = []
                for arrival in own + others:
                    if not arrival.part.done():
                        late.add(arrival.id)
                    elif arrival.part.cancelled() or (arrival.part.exception() is not None and arrival not in below):
                        missing.append(arrival.id)  # what another failed to bring, we try ourselves
                    elif (part := arrival.part.result()) is not None:
                        self._side.arrive(arrival.event, part)
                        parts[arrival.id] = part
        finally:
            self._release(chosen, claimed, late)
        return Gathered(parts, frozenset(late))

    def _claim(self, ids: Sequence[int], dtype: torch.dtype) -> tuple[list[Arrival], list[Arrival]]:
        """What the caller has to bring, and what is ready or others are bringing."""
        own: list[Arrival] = []
        theirs: list[Arrival] = []
        with self._lock:
            for id in ids:
                arrival = self._there.setdefault((id, dtype), Arrival(id, dtype, self._fetcher.part_bytes(dtype)))
                (theirs if arrival.begun else own).append(arrival)
                arrival.begun = arrival.is_used = True
                arrival.waiters += 1
        return own, theirs

    def _below(self, own: Sequence[Arrival]) -> list[Arrival]:
        """Those that the fastest tier does not have. They have not begun any more."""
        is_near = self._fetcher.hierarchy.near(as_ids([arrival.id for arrival in own])).tolist()
        below = [arrival for arrival, near in zip(own, is_near, strict=True) if not near]
        with self._lock:
            for arrival in below:
                arrival.begun = False
        return below

    def _bring_below(self, arrivals: Sequence[Arrival], owners: tuple[int, ...]) -> None:
        """What a recall waits for until its deadline, in the background."""
        stages = self._meter.lookahead(owners)
        try:
            self.bring(arrivals, stages)
        except M3Error:
            raise
        except BaseException:
            if not any(arrival.waiters for arrival in arrivals):  # else the recall raises it
                raise
        finally:
            stages.count()

    def _release(
        self, chosen: Mapping[int, Collection[int]], claimed: Sequence[Arrival], late: Collection[int]
    ) -> None:
        with self._lock:
            for owner, ids in chosen.items():
                for arrival in claimed:
                    if arrival.id in late and arrival.id in ids and not arrival.part.done():
                        self._reserve(arrival, owner)
            for arrival in claimed:
                arrival.waiters -= 1
                self._tidy(arrival)

    # -- bringing -----------------------------------------------------------------------------------------------

    def _abandon(self, arrivals: Iterable[Arrival]) -> None:
        """Nobody will bring those that have not begun."""
        with self._lock:
            for arrival in arrivals:
                if not arrival.begun:
                    self._remove(arrival)
                    arrival.part.cancel()

    def _bring(self, arrivals: Sequence[Arrival], stages: Stages, *, aside: bool) -> None:
        """Read them in one call and decode them, what is waited for first; ``aside`` on the thread's own stream."""
        if not arrivals:
            return
        left = {arrival.id: arrival for arrival in arrivals}
        try:
            with self._side.use() if aside else nullcontext():
                with stages.stage("read", len(left)):
                    if aside:
                        self._fetcher.references(list(left), fresh=False)  # for the recall
                    ids, blocks = self._fetcher.read(as_ids(list(left)))
                row_of = {id: row for row, id in enumerate(ids.tolist())}
                for id in left.keys() - row_of.keys():
                    self._finish(left.pop(id), None, None)
                while some := self._next(left):
                    rows = [row_of[arrival.id] for arrival in some]
                    of = blocks if rows == list(range(len(blocks))) else blocks[rows]
                    with stages.stage("decode", len(rows)):
                        parts = self._fetcher.decode(ids[rows], of, some[0].dtype)
                    event = self._side.mark()
                    for id, part in parts.items():
                        self._finish(left.pop(id), part, event)
        except BaseException as error:
            self._fail(left.values(), error)
            raise

    def _next(self, left: dict[int, Arrival]) -> list[Arrival]:
        """What to decode next. What nobody wants any more is taken out."""
        with self._lock:
            for arrival in [arrival for arrival in left.values() if not arrival.is_wanted]:
                del left[arrival.id]
                self._remove(arrival)
                arrival.part.cancel()
            return sorted(left.values(), key=lambda arrival: -arrival.waiters)[: self._fetcher.at_once]

    def _finish(self, arrival: Arrival, part: Part | None, event: torch.Event | None) -> None:
        with self._lock:
            size = 0 if part is None else sum(x.nbytes for x in part)
            if arrival.is_reserved:
                self._in_flight += size - arrival.size
            arrival.size, arrival.event = size, event
            arrival.part.set_result(part)
            self._tidy(arrival)

    def _fail(self, arrivals: Iterable[Arrival], error: BaseException) -> None:
        with self._lock:
            for arrival in arrivals:
                if not arrival.part.done():
                    self._remove(arrival)
                    arrival.part.set_exception(error)

    # -- the books, under the lock ------------------------------------------------------------------------------

    def _reserve(self, arrival: Arrival, owner: int) -> bool:
        """Make it a guess of ``owner``, if there is room for one more."""
        if not arrival.is_reserved:
            if self._in_flight + arrival.size > self.in_flight:
                return False
            arrival.is_reserved = True
            self._in_flight += arrival.size
        arrival.guessers.add(owner)
        self._guesses.setdefault(owner, set()).add(arrival)
        return True

    def _tidy(self, arrival: Arrival) -> None:
        """Let go of what nobody wants, unless it is being brought."""
        if arrival.is_wanted or (arrival.begun and not arrival.part.done()):
            return
        self._remove(arrival)
        if not arrival.begun:
            arrival.part.cancel()
        elif not arrival.is_used:
            self._wasted += arrival.size

    def _remove(self, arrival: Arrival) -> None:
        if self._there.get((arrival.id, arrival.dtype)) is arrival:
            del self._there[arrival.id, arrival.dtype]
        if arrival.is_reserved:
            arrival.is_reserved = False
            self._in_flight -= arrival.size
        for owner in arrival.guessers:
            self._guesses.get(owner, set()).discard(arrival)
        arrival.guessers.clear()
