"""`Labels`: the metadata of all references in memory, as far as conditions ask for it."""

import threading
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from m3runtime.bank import records
from m3runtime.config.where import SOURCE, Where
from m3runtime.documents.sources import SourceState
from m3runtime.memory.block import Ids, as_ids
from m3runtime.retrieval.restriction import meets
from m3runtime.storage.home import Home

Label = tuple[str, tuple[str | None, ...]]
"""A source, and the values of the fields in their order."""
_BATCH = 4096
_MOST_FIELDS = 16
"""Fields that are kept. Requests name them, so their number is bounded: beyond it all are read anew."""


class Labels:
    """Twelve bytes for each place of a reference, and each different label once. Thread-safe.

    A field that is asked for first makes it read all references, about ten seconds for a million. After that it reads
    those of sources whose `SourceState` changed or is not known, and those whose ids are new.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._lock = threading.Lock()
        self._fields: tuple[str, ...] = ()
        self._revision = -1
        self._states: Mapping[str, SourceState] = {}
        self._numbers: dict[Label, int] = {}
        self._ids = as_ids(())
        self._labels: npt.NDArray[np.uint32] = np.zeros(0, np.uint32)

    def ids(self, where: Where, revision: int) -> Ids:
        """The ids that have a place which meets these conditions, ascending, as the home is at ``revision`` or later.

        Raises what the home raises.
        """
        asked = sorted({one.field for one in where} - {SOURCE})
        with self._lock:
            if new := [field for field in asked if field not in self._fields]:
                room = len(self._fields) + len(new) <= _MOST_FIELDS
                self._fields = (*self._fields, *new) if room else tuple(asked)
                self._states, self._revision, self._numbers = {}, -1, {}
                self._ids, self._labels = as_ids(()), np.zeros(0, np.uint32)
            if self._revision < revision:
                self._catch_up()
            passing = np.array([self._passes(where, *label) for label in self._numbers], np.bool_)
            return np.unique(self._ids[passing[self._labels]]) if len(self._labels) else as_ids(())

    def _passes(self, where: Where, source: str, values: tuple[str | None, ...]) -> bool:
        metadata = {field: value for field, value in zip(self._fields, values, strict=True) if value is not None}
        return meets(where, source, metadata)

    def _catch_up(self) -> None:
        revision, states, now = self._home.revision(), self._home.states(), self._home.ids()
        stale = np.setdiff1d(now, self._ids)
        if len(self._ids):
            changed = [name for name in self._home.sources() if not _is_same(states.get(name), self._states.get(name))]
            stale = np.unique(np.concatenate([stale, *map(self._home.ids_of, changed)]))
            names = set(changed)
            numbers = [number for (source, _), number in self._numbers.items() if source in names]
            stale = np.union1d(stale, self._ids[np.isin(self._labels, numbers)])
        stays = np.isin(self._ids, now) & ~np.isin(self._ids, stale)
        ids, labels = self._read(np.intersect1d(stale, now))
        self._ids = np.concatenate([self._ids[stays], ids])
        self._labels = np.concatenate([self._labels[stays], labels])
        self._states, self._revision = states, revision

    def _read(self, ids: Ids) -> tuple[Ids, npt.NDArray[np.uint32]]:
        found, labels = list[int](), list[int]()
        for start in range(0, len(ids), _BATCH):
            some = ids[start : start + _BATCH]
            references, _ = records.references(self._home, some)
            for id, reference in zip(some.tolist(), references, strict=True):
                places = () if reference is None else reference.places
                for label in {(place.source, tuple(map(place.metadata.get, self._fields))) for place in places}:
                    found.append(id)
                    labels.append(self._numbers.setdefault(label, len(self._numbers)))
        return as_ids(found), np.array(labels, np.uint32)


def _is_same(state: SourceState | None, before: SourceState | None) -> bool:
    """Has a source the same references as before? Nobody knows of one without a state, or with a void one."""
    return state is not None and state.how != "" and state == before
