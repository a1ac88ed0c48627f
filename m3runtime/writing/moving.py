"""`Moves`: sources that are renamed or forgotten without being read."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from m3runtime.bank import records
from m3runtime.documents.reference import Place
from m3runtime.documents.sources import SourceState
from m3runtime.memory.block import as_ids
from m3runtime.storage.home import Changes, Home

_SOURCES = 256
"""Sources that one transaction changes, each as a whole."""
_BATCH = 1024


class Moves:
    """Changes of sources, many in one transaction; `make` makes the last. Call its methods in one thread.

    ``copy``, ``forget`` and ``state`` may raise `RecordError`, `BankFullError` and `TierReadOnlyError`.
    """

    def __init__(self, home: Home) -> None:
        self.forgotten: list[int] = []
        """The ids that were forgotten, because no source has them any more or they were dropped."""
        self._home = home
        self._places: dict[int, tuple[Place, ...]] = {}
        self._states: dict[str, SourceState | None] = {}

    def copy(self, origin: str, source: str, state: SourceState, *, instead: bool) -> None:
        """Give the references of a source the same places in another, ``instead`` of it or in addition."""
        for id, places in self._of(origin).items():
            copies = [replace(place, source=source) for place in places if place.source == origin]
            stay = [place for place in places if not (instead and place.source == origin) and place.source != source]
            self._places[id] = (*stay, *copies)
        if instead:
            self._states[origin] = None
        self.state(source, state)

    def forget(self, source: str, record: str | None = None) -> None:
        """Take its places from all references of a source, or of one of its records."""
        gone = source if record is None else f"{source}:{record}"
        for id, places in self._of(source).items():
            self._places[id] = tuple(place for place in places if gone not in (place.source, place.name))
        if record is None:
            self.state(source, None)

    def expire(self, today: str) -> None:
        """Take the places whose last day has passed from all references. Their sources keep their states."""
        expiring = self._home.expiring(today)
        ids = np.unique(np.concatenate([*expiring.values(), as_ids(())]))
        states = self._home.states() if len(ids) else {}
        for start in range(0, len(ids), _BATCH):
            some = ids[start : start + _BATCH]
            references, _ = records.references(self._home, some)
            for id, one in zip(some.tolist(), references, strict=True):
                self._places[id] = () if one is None else one.living(today)  # a damaged one cannot be recalled
                sources = () if one is None else one.sources
                self._states |= {source: states[source] for source in sources if source in states}
            self.make()

    def drop(self, ids: Iterable[int]) -> None:
        """Forget references wherever they stand."""
        self._places |= dict.fromkeys(ids, ())

    def state(self, source: str, state: SourceState | None) -> None:
        """Note how a source is. It is the last step of each of its changes."""
        self._states[source] = state
        if len(self._states) >= _SOURCES:
            self.make()

    def make(self) -> None:
        """Make all changes in one transaction."""
        if self._states or self._places:
            self._home.change(Changes(self._places, self._states))
            self.forgotten += [id for id, places in self._places.items() if not places]
            self._places, self._states = {}, {}

    def _of(self, source: str) -> Mapping[int, tuple[Place, ...]]:
        """The places that the references of a source will have. References that cannot be read are left out."""
        found = dict[int, tuple[Place, ...]]()
        ids = self._home.ids_of(source)
        for start in range(0, len(ids), _BATCH):
            some = ids[start : start + _BATCH]
            references, _ = records.references(self._home, some)
            found |= {id: one.places for id, one in zip(some.tolist(), references, strict=True) if one is not None}
        return found | {id: self._places[id] for id in found.keys() & self._places.keys()}
