"""`Groups`: the transactions that make a bank mirror its sources."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from m3runtime.bank import records
from m3runtime.bank.bank import Bank
from m3runtime.documents.reference import Place, Reference
from m3runtime.documents.sources import SourceState
from m3runtime.documents.spool import ReferenceSpool
from m3runtime.memory.block import as_ids
from m3runtime.storage.home import Changes
from m3runtime.writing.encoding import GROUP, Group, Store

_MOST_STATES = 256
"""Sources without anything to encode whose states one transaction stores."""
_MOST_PLACES = 16_384
"""References that one transaction gives other places. A source that moves more takes several."""


class Groups:
    """Groups of references that are new or cold, each with the transaction that stores it; counts the others.

    Both kinds keep their order, and a group is made when it is full: run again after a crash, the groups are the same.
    The transaction with the last new references of a source also moves and forgets its others, and states how the
    source was. Until then it has no state, so an interrupted write begins it anew.
    """

    def __init__(
        self, bank: Bank, references: ReferenceSpool, states: Mapping[str, SourceState | None], *, catalogue: bool
    ) -> None:
        """``states`` are of all sources that are mirrored. Those of the documents are, too; these have no state."""
        self.known = self.stored = self.forgotten = 0
        self._bank = bank
        self._references = references
        self._states = states
        self._catalogue = catalogue
        self._sources = dict.fromkeys(states, 0) | references.sources
        self._stated = bank.home.states().keys()
        self._before = bank.home.sources().keys()
        self._new: list[Reference] = []
        self._cold: dict[int, Reference] = {}
        self._places: dict[int, tuple[Place, ...]] = {}
        self._finished: dict[str, SourceState | None] = {}

    def __iter__(self) -> Iterator[tuple[Store, Group]]:
        """The groups, which must be stored in this order."""
        home, references, done = self._bank.home, iter(self._references), 0
        waiting = sorted(self._sources.items(), key=lambda source: -source[1])
        while some := list(islice(references, GROUP)):
            found = home.find([one.text for one in some], [one.heading for one in some])
            known = as_ids([id for id in found if id is not None])
            self._move(known.tolist())
            lacking = set() if self._catalogue else set(home.cold(known).tolist())
            for one, id in zip(some, found, strict=True):
                if id is None:
                    self._new.append(one)
                elif id in lacking:
                    self._cold[id] = one
                else:
                    self.known += 1
                done += 1
                while waiting and waiting[-1][1] <= done:
                    self._finish(waiting.pop()[0])
                yield from self._full()
        while waiting:
            self._finish(waiting.pop()[0])
            yield from self._full()
        yield from self._rest()

    def _full(self) -> Iterator[tuple[Store, Group]]:
        """The transactions that are due."""
        if len(self._cold) == GROUP:
            yield self._fill()
        nothing = not (self._new or self._cold)
        if (
            len(self._new) == GROUP
            or len(self._places) >= _MOST_PLACES
            or (nothing and len(self._finished) == _MOST_STATES)
        ):
            yield from self._rest()

    def _rest(self) -> Iterator[tuple[Store, Group]]:
        """Transactions for all that waits. Cold references are filled before a state vouches for them."""
        if self._cold:
            yield self._fill()
        if self._new:
            yield (Group.catalogue if self._catalogue else Group.commit), self._group()
        elif self._places or self._finished:
            yield Group.change, self._group()

    def _fill(self) -> tuple[Store, Group]:
        cold, self._cold = self._cold, {}
        self.stored += len(cold)
        return Group.fill, Group(self._bank, as_ids(list(cold)), list(cold.values()))

    def _group(self) -> Group:
        """The new references, and all changes."""
        new, self._new = self._new, []
        changes, self._places, self._finished = Changes(self._places, self._finished), {}, {}
        self.stored += len(new)
        first = self._bank.home.reserve(len(new)) if new else 0
        return Group(self._bank, as_ids(range(first, first + len(new))), new, changes)

    def _finish(self, source: str) -> None:
        """Move and forget what a source had and has no more. All that it has is in a group."""
        # A search for each of many new files would cost a home in an object store hundreds of requests.
        members = self._bank.home.ids_of(source).tolist() if source in self._before else []
        for start in range(0, len(members), GROUP):
            self._move(members[start : start + GROUP])
        state = self._states.get(source)
        if state is not None or source in self._stated:
            self._finished[source] = state

    def _move(self, ids: Sequence[int]) -> None:
        """Give references the places that the documents have of them; places in other sources stay."""
        found, _ = records.references(self._bank.home, as_ids(ids))
        for id, one in zip(ids, found, strict=True):
            if one is None or id in self._places:
                continue
            wanted = self._references.places(one)
            stay = [place for place in one.places if place.source not in self._sources or place in wanted]
            places = (*stay, *(place for place in wanted if place not in stay))
            if places != one.places:
                self._places[id] = places
                self.forgotten += not places
