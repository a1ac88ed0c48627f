"""`Hints`: prefetches the memories that streams will probably recall next, in the background."""

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from m3runtime.memory.block import as_ids
from m3runtime.observe.counts import LookaheadCounts
from m3runtime.observe.metrics import Meter, Phases
from m3runtime.recall.background import Background
from m3runtime.recall.lease import Lease
from m3runtime.recall.loader import Loader
from m3runtime.retrieval.match import Match
from m3runtime.retrieval.query import Text
from m3runtime.retrieval.restriction import UNRESTRICTED, Restriction

Search = Callable[[Sequence["Hint"], Phases], list[list[Match]]]
"""Embeds the texts of hints and returns the matches of each, best first."""


@dataclass(eq=False, slots=True)
class Hint:
    """A text that one stream will probably recall by."""

    stream: int
    """The stream's number."""
    text: Text
    dtype: torch.dtype
    held: frozenset[int]
    """Ids that the stream leases already: its recall finds them in the store."""
    owed: tuple[Match, ...]
    """Matches that were late for the stream's last chunk, and that its next recall adds."""
    restriction: Restriction = UNRESTRICTED
    """The memories that the stream may read."""
    is_taken: bool = False
    """Does a thread work on it?"""


class Hints:
    """Works on the newest hint of each stream, and holds its guesses until the stream recalls.

    All waiting hints are embedded and searched together, and what they choose is read in one call. Memories that the
    store has no room for are only lifted to the fastest tier. Thread-safe; no lock is held while anything is embedded,
    searched, read or decoded.
    """

    def __init__(self, search: Search, loader: Loader, background: Background, meter: Meter, *, memories: int) -> None:
        """``memories`` is ``recall.memories``: the most memories of a chunk."""
        self._search = search
        self._loader = loader
        self._store = loader.store
        self._background = background
        self._meter = meter
        self._memories = memories
        self._lock = threading.Lock()
        self._waiting: dict[int, Hint] = {}  # the newest of each stream, until its memories are asked for
        self._guesses: dict[int, list[Lease]] = {}
        self._guessed: dict[int, frozenset[int]] = {}  # ids, also of guesses without room
        self._counts = Counter[str]()

    def add(self, hints: Sequence[Hint]) -> None:
        """Work on these in the background, each in place of an earlier one of its stream.

        Raises `TierClosedError` after the background was closed.
        """
        with self._lock:
            self._counts["hints"] += len(hints)
            for hint in hints:
                self._cancel(hint.stream)
                self._waiting[hint.stream] = hint
        self._background.submit(self._work)

    def begin_recall(self, streams: Iterable[int]) -> None:
        """Cancel the hints of these streams that no thread works on: they come too late."""
        with self._lock:
            for stream in streams:
                if stream in self._waiting and not self._waiting[stream].is_taken:
                    self._cancel(stream)

    def end_recall(self, stream: int, chosen: Iterable[int], late: Iterable[Lease]) -> None:
        """Replace the guesses of a stream by what still loads for it, and count which its recall ``chosen``."""
        kept = self._store.share(late, guess=True)
        with self._lock:
            self._cancel(stream)
            guesses = self._guesses.pop(stream, [])
            self._counts["hits"] += len(self._guessed.pop(stream, frozenset()).intersection(chosen))
            if kept:
                self._guesses[stream] = kept
        self._store.release(guesses)

    def end(self, stream: int) -> None:
        """Drop the hint and the guesses of a stream that has ended."""
        with self._lock:
            self._cancel(stream)
            guesses = self._guesses.pop(stream, [])
            self._guessed.pop(stream, None)
        self._store.release(guesses)

    def counts(self) -> LookaheadCounts:
        """A snapshot."""
        failed, last_error = self._background.failures()
        with self._lock:
            return LookaheadCounts(**self._counts, failed=failed, last_error=last_error)

    # -- in the background -------------------------------------------------------------------------------------

    def _work(self) -> None:
        with self._lock:
            hints = [hint for hint in self._waiting.values() if not hint.is_taken]
            for hint in hints:
                hint.is_taken = True
        if hints:
            self._follow(hints)

    def _follow(self, hints: Sequence[Hint]) -> None:
        """Search for these hints, and load what was found."""
        phases = self._meter.lookahead(tuple(hint.stream for hint in hints))
        try:
            chosen = self._search(hints, phases)
        except Exception:  # one by one, so that each hint fails by itself
            if len(hints) == 1:
                raise
            for hint in hints:
                self._background.submit(partial(self._follow, [hint]))
            return
        finally:
            phases.count()
        for dtype in dict.fromkeys(hint.dtype for hint in hints):
            self._load([both for both in zip(hints, chosen, strict=True) if both[0].dtype == dtype], dtype)

    def _load(self, found: Sequence[tuple[Hint, list[Match]]], dtype: torch.dtype) -> None:
        """Guess and load the matches of the hints that are still the newest of their streams."""
        leases: list[Lease] = []
        beyond: set[int] = set()
        known: set[int] = set()
        scores: dict[int, float] = {}
        streams: list[int] = []
        old: list[Lease] = []
        for hint, matches in found:
            best = with_owed(matches, hint.owed, self._memories)
            known.update(match.id for match in best)
            best = [match for match in best if match.id not in hint.held]
            mine, no_room, _ = self._store.lease([match.id for match in best], dtype, guess=True)
            with self._lock:
                if self._waiting.get(hint.stream) is hint:
                    del self._waiting[hint.stream]
                    old += self._guesses.pop(hint.stream, [])
                    self._guesses[hint.stream] = mine
                    self._guessed[hint.stream] = frozenset(match.id for match in best)
                    self._counts.update(guesses=len(best), beyond=len(no_room))
                else:  # overtaken, and counted as cancelled by whoever did
                    old += mine
                    continue
            leases += mine
            beyond.update(no_room)
            scores.update((match.id, match.score) for match in best)
            streams.append(hint.stream)
        self._store.release(old)
        phases = self._meter.lookahead(tuple(streams))
        try:
            loaded = self._loader.load(leases, object(), phases, aside=True)
            # What was loaded before may have been forgotten by another process since.
            self._loader.forget_strangers(list(known.difference(loaded)))
            if beyond:
                with phases.phase("lift", len(beyond)):
                    self._loader.hierarchy.lift(as_ids(sorted(beyond)))
        except BaseException:
            self._store.release(leases)
            raise
        finally:
            phases.count()
        if scores:  # once the tiers hold them
            self._loader.hierarchy.score(as_ids(list(scores)), np.array(list(scores.values()), np.float32))

    # -- bookkeeping, under the lock ---------------------------------------------------------------------------

    def _cancel(self, stream: int) -> None:
        if self._waiting.pop(stream, None) is not None:
            self._counts["cancelled"] += 1


def with_owed(matches: Sequence[Match], owed: Sequence[Match], most: int) -> list[Match]:
    """The best ``most`` of the matches and of what is owed from the last chunk, best first, each id once."""
    found = {id for match in matches for id in (match.id, *match.stands_for)}
    both = [*matches, *(match for match in owed if match.id not in found)]
    return sorted(both, key=lambda match: -match.score)[:most]
