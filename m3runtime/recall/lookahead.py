"""`Lookahead`: brings what streams will probably need, so that at a chunk's end there is next to nothing left to do."""

import threading
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from m3runtime.memory.block import as_ids
from m3runtime.observe.metrics import LookaheadCounts, Meter, Stages
from m3runtime.recall.arrivals import Arrival, Arrivals, Gathered
from m3runtime.recall.fetching import Fetcher
from m3runtime.recall.prefetch import Prefetcher
from m3runtime.retrieval.retriever import Match

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


class Lookahead:
    """Works on hints in the prefetcher's threads, and ends them when their streams recall.

    All hints that wait are embedded and searched together; what was found is read in one call and decoded, and is then
    ready for the recall (see `Arrivals`). What there is no room for is only lifted. What a newer hint of the stream, or
    its recall, did not choose is dropped.

    No lock is held while anything is embedded, searched, read or decoded. Thread-safe.
    """

    def __init__(
        self, fetcher: Fetcher, choose: Choose, prefetcher: Prefetcher, meter: Meter, *, in_flight: int
    ) -> None:
        self.arrivals = Arrivals(fetcher, prefetcher, meter, in_flight=in_flight)
        self._fetcher = fetcher
        self._hierarchy = fetcher.hierarchy
        self._choose = choose
        self._prefetcher = prefetcher
        self._meter = meter
        self._lock = threading.Lock()  # taken before that of the arrivals
        self._hints: dict[int, Hint] = {}  # the newest of each stream, until its recall
        self._guessed: dict[int, frozenset[int]] = {}  # ids of each stream
        self._counts = LookaheadCounts()

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

    def gather(
        self,
        chosen: Mapping[int, Collection[int]],
        ids: Sequence[int],
        dtype: torch.dtype,
        stages: Stages,
        deadline: float | None,
    ) -> Gathered:
        """See `Arrivals.gather`. It ends the hints and guesses of the streams; what is late is the one that is left."""
        late: frozenset[int] = frozenset()
        with self._lock:
            for owner, some in chosen.items():
                self._count(hits=len(self._guessed.get(owner, frozenset()).intersection(some)))
        try:
            gathered = self.arrivals.gather(chosen, ids, dtype, stages, deadline)
            late = gathered.late
        finally:
            for owner, some in chosen.items():
                self._end(owner, keep=late.intersection(some))
        return gathered

    def forget(self, owner: int) -> None:
        """The stream has ended."""
        self._end(owner)

    def counts(self) -> LookaheadCounts:
        """A snapshot."""
        stats, arrivals = self._prefetcher.stats(), self.arrivals
        with self._lock:
            counts = self._counts
        return replace(
            counts,
            failed=stats.failed,
            last_error=stats.last_error,
            wasted_bytes=arrivals.wasted_bytes,
            in_flight_bytes=arrivals.in_flight_bytes,
        )

    # -- in the background --------------------------------------------------------------------------------------

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
        new: list[Arrival] = []
        beyond: list[int] = []
        scores: dict[int, float] = {}
        owners: list[int] = []
        with self._lock:
            for hint, matches in found:
                if self._hints.get(hint.owner) is not hint:
                    continue  # counted when it was overtaken
                hint.is_done = True
                owners.append(hint.owner)
                scores.update((match.id, match.score) for match in matches)
                guessed = dict.fromkeys(match.id for match in matches if match.id not in hint.held)
                self.arrivals.drop(hint.owner, keep=guessed)
                self._guessed[hint.owner] = frozenset(guessed)
                to_bring, no_room = self.arrivals.guess(hint.owner, guessed, dtype)
                new += to_bring
                beyond += no_room
                self._count(guesses=len(guessed), beyond=len(no_room))
        # So that the recall need not ask the home, nor be told of what another process forgot.
        self._fetcher.references(list(scores))
        if new or beyond:
            self.arrivals.submit(new, partial(self._look, new, beyond, scores, tuple(owners)))

    def _look(
        self, new: Sequence[Arrival], beyond: Sequence[int], scores: Mapping[int, float], owners: tuple[int, ...]
    ) -> None:
        """Bring one guess."""
        stages = self._meter.lookahead(owners)
        with self._lock:
            wanted = frozenset[int]().union(*(self._guessed.get(owner, ()) for owner in owners))
        lifted = wanted.intersection(beyond)
        try:
            self.arrivals.bring(new, stages)
            if lifted:
                with stages.stage("lift", len(lifted)):
                    self._hierarchy.lift(as_ids(sorted(lifted)))
        finally:
            stages.count()
        # Once the tiers hold them.
        self._hierarchy.score(as_ids(list(scores)), np.array(list(scores.values()), np.float32))

    # -- the books ----------------------------------------------------------------------------------------------

    def _end(self, owner: int, keep: Collection[int] = ()) -> None:
        """What this stream hinted at and guessed is over, but for ``keep``."""
        with self._lock:
            self._overtake(owner)
            self._guessed.pop(owner, None)
            self.arrivals.drop(owner, keep)

    def _overtake(self, owner: int) -> None:
        """Whatever this stream hinted at is not what it wants now."""
        hint = self._hints.pop(owner, None)
        if hint is not None and not hint.is_done:
            self._count(cancelled=1)

    def _count(self, **more: int) -> None:
        self._counts = replace(self._counts, **{name: getattr(self._counts, name) + by for name, by in more.items()})
