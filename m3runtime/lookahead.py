"""`Lookahead`: brings what streams will probably need, so that at a chunk's end there is next to nothing left to do."""

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch

from m3runtime.bank import as_ids
from m3runtime.errors import M3Error
from m3runtime.fetching import Fetcher
from m3runtime.metrics import LookaheadCounts, Meter, Stages
from m3runtime.prefetch import Prefetcher
from m3runtime.retrieval import Match
from m3runtime.side_stream import SideStream
from m3runtime.stream import Part

Choose = Callable[[Sequence[str], Stages], list[list[Match]]]
"""Embeds and searches: matches of each text."""


@dataclass(eq=False, slots=True)
class Hint:
    """What a stream is about to ask for."""

    owner: int
    """The stream's number."""
    text: str
    dtype: torch.dtype
    held: frozenset[int]
    """Ids that the stream holds: they need not be brought."""
    amend: Callable[[list[Match]], None]
    """Makes of what was found what the recall would choose, in place."""
    is_taken: bool = False
    """Whether it is being worked on."""
    is_done: bool = False
    """Whether its memories were asked for, or it failed."""


@dataclass(eq=False, slots=True)
class _Entry:
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
        return bool(self.guessers or self.waiters)


@dataclass(frozen=True, slots=True)
class Gathered:
    """What `Lookahead.gather` brought."""

    parts: Mapping[int, Part]
    late: frozenset[int]


class Lookahead:
    """Every memory that is being brought, for a recall or for a hint, by id and dtype: nobody brings it a second time.

    Hints are worked on by the prefetcher's threads: all that wait are embedded and searched together; what was found
    is read in one call and decoded, and is then ready for the recall. Decoded guesses, ready or under way, take at most
    ``in_flight`` bytes over all streams; what does not fit is only lifted. What a newer hint of the stream, or its
    recall, did not choose is dropped: at once, or when it is there if its block is already being read.

    No lock is held while anything is embedded, searched, read or decoded. Thread-safe.
    """

    def __init__(
        self, fetcher: Fetcher, choose: Choose, prefetcher: Prefetcher, meter: Meter, *, in_flight: int
    ) -> None:
        self.in_flight = in_flight
        self._fetcher = fetcher
        self._choose = choose
        self._prefetcher = prefetcher
        self._meter = meter
        self._side = SideStream(fetcher.device)
        self._lock = threading.Lock()
        self._entries: dict[tuple[int, torch.dtype], _Entry] = {}
        self._hints: dict[int, Hint] = {}  # the newest of each stream, until its recall
        self._guessed: dict[int, frozenset[int]] = {}  # ids of each stream, also those that are only lifted
        self._guesses: dict[int, set[_Entry]] = {}  # those of them that are to be decoded
        self._counts = LookaheadCounts()

    # -- hints --------------------------------------------------------------------------------------------------

    def hint(self, hints: Sequence[Hint]) -> None:
        """Work on these in the background, in place of earlier ones of the same streams.

        Raises `TierClosedError` after the prefetcher was closed, and what went wrong by mistake before.
        """
        with self._lock:
            self._count(hints=len(hints))
            for hint in hints:
                self._overtake(hint.owner)
                self._hints[hint.owner] = hint
        self._prefetcher.hint("hints", self._work)

    def begin(self, owners: Iterable[int]) -> None:
        """These streams recall now: a hint that waits is too late."""
        with self._lock:
            for owner in owners:
                if owner in self._hints and not self._hints[owner].is_taken:
                    self._overtake(owner)

    def forget(self, owner: int) -> None:
        """The stream has ended."""
        with self._lock:
            self._overtake(owner)
            self._drop(owner, keep=())

    def counts(self) -> LookaheadCounts:
        """A snapshot."""
        stats = self._prefetcher.stats()
        with self._lock:
            return replace(self._counts, failed=stats.failed, last_error=stats.last_error)

    def _work(self) -> None:
        with self._lock:
            hints = [hint for hint in self._hints.values() if not hint.is_taken]
            for hint in hints:
                hint.is_taken = True
        if hints:
            self._search(hints)

    def _search(self, hints: Sequence[Hint]) -> None:
        stages = self._meter.lookahead(tuple(hint.owner for hint in hints))
        try:
            chosen = self._choose([hint.text for hint in hints], stages)
        except Exception:  # one by one, so that each fails by itself
            if len(hints) == 1:
                hints[0].is_done = True
                raise
            for hint in hints:
                self._prefetcher.hint(("hint", hint.owner), partial(self._search, [hint]))
            return
        finally:
            stages.count()
        for hint, matches in zip(hints, chosen, strict=True):
            hint.amend(matches)
        for dtype in {hint.dtype for hint in hints}:
            self._guess([both for both in zip(hints, chosen, strict=True) if both[0].dtype == dtype], dtype)

    def _guess(self, found: Sequence[tuple[Hint, list[Match]]], dtype: torch.dtype) -> None:
        """Bring what was found for hints that are still the newest of their streams."""
        entries: list[_Entry] = []
        beyond: list[int] = []
        scores: dict[int, float] = {}
        owners: list[int] = []
        with self._lock:
            for hint, matches in found:
                if self._hints.get(hint.owner) is not hint:
                    continue  # counted when it was overtaken
                owners.append(hint.owner)
                hint.is_done = True
                guessed = frozenset(match.id for match in matches) - hint.held
                self._drop(hint.owner, keep=guessed)
                self._guessed[hint.owner] = guessed
                self._count(guesses=len(guessed))
                for match in matches:
                    scores[match.id] = match.score
                    if match.id not in guessed:
                        continue
                    entry = self._entries.get((match.id, dtype))
                    if entry is not None:
                        self._reserve(entry, hint.owner)
                        continue
                    entry = _Entry(match.id, dtype, self._fetcher.part_bytes(dtype))
                    if self._reserve(entry, hint.owner):
                        self._entries[match.id, dtype] = entry
                        entries.append(entry)
                    elif match.id not in beyond:
                        beyond.append(match.id)
            self._count(beyond=len(beyond))
        if entries or beyond:
            self._submit(entries, partial(self._look, entries, beyond, scores, tuple(owners)))

    def _look(
        self, entries: Sequence[_Entry], beyond: Sequence[int], scores: Mapping[int, float], owners: tuple[int, ...]
    ) -> None:
        """One guess, in the background."""
        hierarchy = self._fetcher.hierarchy
        stages = self._meter.lookahead(owners)
        with self._lock:
            wanted = frozenset[int]().union(*(self._guessed.get(owner, ()) for owner in owners))
        lifted = [id for id in beyond if id in wanted]
        try:
            self._bring(self._begun(entries), stages, aside=True)
            if lifted:
                with stages.stage("lift", len(lifted)):
                    hierarchy.lift(as_ids(lifted))
        finally:
            stages.count()
        # Once the tiers hold them.
        hierarchy.score(as_ids(list(scores)), np.array(list(scores.values()), np.float32))

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
        prefetcher, and not waited for any longer. ``chosen`` is what each stream is to get. It ends their guesses, but
        what is late becomes one.
        """
        with self._lock:
            for owner, some in chosen.items():
                self._count(hits=len(self._guessed.get(owner, frozenset()).intersection(some)))
        parts: dict[int, Part] = {}
        late: set[int] = set()
        claimed: list[_Entry] = []
        missing = list(ids)
        try:
            while missing:
                own, theirs = self._claim(missing, dtype)
                claimed += own + theirs
                try:
                    below = [] if deadline is None or not own else self._below(own)
                    if below:
                        self._submit(below, partial(self._bring_below, below, tuple(chosen)), urgent=True)
                    own = [entry for entry in own if entry not in below]
                    self._bring(own, stages, aside=False)
                except BaseException as error:
                    self._fail([entry for entry in own if entry.begun], error)  # or others would wait for them
                    raise
                others = theirs + below
                if not all(entry.part.done() for entry in others):
                    left = None if deadline is None else max(0.0, deadline - time.perf_counter())
                    with stages.stage("wait", len(others)):
                        wait([entry.part for entry in others], left)
                missing = []
                for entry in own + others:
                    if not entry.part.done():
                        late.add(entry.id)
                    elif entry.part.cancelled() or (entry.part.exception() is not None and entry not in below):
                        missing.append(entry.id)  # what another failed to bring, we try ourselves
                    elif (part := entry.part.result()) is not None:
                        self._side.arrive(entry.event, part)
                        parts[entry.id] = part
        finally:
            self._settle(chosen, claimed, late)
        return Gathered(parts, frozenset(late))

    def _claim(self, ids: Sequence[int], dtype: torch.dtype) -> tuple[list[_Entry], list[_Entry]]:
        """What the caller has to bring, and what is ready or others are bringing."""
        own: list[_Entry] = []
        theirs: list[_Entry] = []
        with self._lock:
            for id in ids:
                entry = self._entries.setdefault((id, dtype), _Entry(id, dtype, self._fetcher.part_bytes(dtype)))
                (theirs if entry.begun else own).append(entry)
                entry.begun = entry.is_used = True
                entry.waiters += 1
        return own, theirs

    def _below(self, own: Sequence[_Entry]) -> list[_Entry]:
        """Those that the fastest tier does not have. They have not begun any more."""
        is_near = self._fetcher.hierarchy.near(as_ids([entry.id for entry in own])).tolist()
        below = [entry for entry, near in zip(own, is_near, strict=True) if not near]
        with self._lock:
            for entry in below:
                entry.begun = False
        return below

    def _bring_below(self, entries: Sequence[_Entry], owners: tuple[int, ...]) -> None:
        """What a recall waits for until its deadline, in the background."""
        stages = self._meter.lookahead(owners)
        mine = self._begun(entries)
        try:
            self._bring(mine, stages, aside=True)
        except M3Error:
            raise
        except BaseException:
            if not any(entry.waiters for entry in mine):  # else the recall raises it
                raise
        finally:
            stages.count()

    def _settle(self, chosen: Mapping[int, Collection[int]], claimed: Sequence[_Entry], late: Collection[int]) -> None:
        """The recall has what it gets: its streams want nothing any more but what was late."""
        with self._lock:
            for owner, some in chosen.items():
                self._overtake(owner)
                owed = set(some).intersection(late)
                for entry in claimed:
                    if entry.id in owed and not entry.part.done():
                        self._reserve(entry, owner)
                self._drop(owner, keep=owed)
            for entry in claimed:
                entry.waiters -= 1
                self._tidy(entry)

    # -- bringing -----------------------------------------------------------------------------------------------

    def _submit(self, entries: Sequence[_Entry], work: Callable[[], None], *, urgent: bool = False) -> None:
        try:
            future = self._prefetcher.hint(object(), work, urgent=urgent)
        except BaseException:
            self._abandon(entries)
            raise
        future.add_done_callback(lambda done: self._abandon(entries) if done.cancelled() else None)

    def _abandon(self, entries: Iterable[_Entry]) -> None:
        """Nobody will bring those that have not begun."""
        with self._lock:
            for entry in entries:
                if not entry.begun:
                    self._remove(entry)
                    entry.part.cancel()

    def _begun(self, entries: Iterable[_Entry]) -> list[_Entry]:
        """Those that are still wanted, and that nobody else has begun meanwhile."""
        with self._lock:
            mine = [entry for entry in entries if not entry.begun and entry.is_wanted]
            for entry in mine:
                entry.begun = True
        return mine

    def _bring(self, entries: Sequence[_Entry], stages: Stages, *, aside: bool) -> None:
        """Read them in one call and decode them, what is waited for first; ``aside`` on the thread's own stream."""
        if not entries:
            return
        left = {entry.id: entry for entry in entries}
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
                    rows = [row_of[entry.id] for entry in some]
                    of = blocks if rows == list(range(len(blocks))) else blocks[rows]
                    with stages.stage("decode", len(rows)):
                        parts = self._fetcher.decode(ids[rows], of, some[0].dtype)
                    event = self._side.mark()
                    for id, part in parts.items():
                        self._finish(left.pop(id), part, event)
        except BaseException as error:
            self._fail(left.values(), error)
            raise

    def _next(self, left: dict[int, _Entry]) -> list[_Entry]:
        """What to decode next. What nobody wants any more is taken out."""
        with self._lock:
            for entry in [entry for entry in left.values() if not entry.is_wanted]:
                del left[entry.id]
                self._remove(entry)
                entry.part.cancel()
            return sorted(left.values(), key=lambda entry: -entry.waiters)[: self._fetcher.at_once]

    def _finish(self, entry: _Entry, part: Part | None, event: torch.Event | None) -> None:
        with self._lock:
            size = 0 if part is None else sum(x.nbytes for x in part)
            if entry.is_reserved:
                self._count(in_flight_bytes=size - entry.size)
            entry.size, entry.event = size, event
            entry.part.set_result(part)
            self._tidy(entry)

    def _fail(self, entries: Iterable[_Entry], error: BaseException) -> None:
        with self._lock:
            for entry in entries:
                if not entry.part.done():
                    self._remove(entry)
                    entry.part.set_exception(error)

    # -- the books, under the lock ------------------------------------------------------------------------------

    def _reserve(self, entry: _Entry, owner: int) -> bool:
        """Make it a guess of ``owner``, if there is room for one more."""
        if not entry.is_reserved:
            if self._counts.in_flight_bytes + entry.size > self.in_flight:
                return False
            entry.is_reserved = True
            self._count(in_flight_bytes=entry.size)
        entry.guessers.add(owner)
        self._guesses.setdefault(owner, set()).add(entry)
        return True

    def _overtake(self, owner: int) -> None:
        """Whatever this stream hinted at is not what it wants now."""
        hint = self._hints.pop(owner, None)
        if hint is not None and not hint.is_done:
            self._count(cancelled=1)

    def _drop(self, owner: int, keep: Collection[int]) -> None:
        """Of what ``owner`` guessed, only ``keep`` is wanted."""
        self._guessed.pop(owner, None)
        kept = set[_Entry]()
        for entry in self._guesses.pop(owner, ()):
            if entry.id in keep:
                kept.add(entry)
            else:
                entry.guessers.discard(owner)
                self._tidy(entry)
        if kept:
            self._guesses[owner] = kept

    def _tidy(self, entry: _Entry) -> None:
        """Let go of what nobody wants, unless it is being brought."""
        if entry.is_wanted or (entry.begun and not entry.part.done()):
            return
        self._remove(entry)
        if not entry.begun:
            entry.part.cancel()
        elif not entry.is_used:
            self._count(wasted_bytes=entry.size)

    def _remove(self, entry: _Entry) -> None:
        if self._entries.get((entry.id, entry.dtype)) is entry:
            del self._entries[entry.id, entry.dtype]
        if entry.is_reserved:
            entry.is_reserved = False
            self._count(in_flight_bytes=-entry.size)
        for owner in entry.guessers:
            self._guesses.get(owner, set()).discard(entry)
        entry.guessers.clear()

    def _count(self, **more: int) -> None:
        self._counts = replace(self._counts, **{name: getattr(self._counts, name) + by for name, by in more.items()})
