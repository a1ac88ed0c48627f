"""`Members`: the ids that meet conditions, as the home is now."""

import threading
from collections import OrderedDict

import numpy as np

from m3runtime.bank.labels import Labels
from m3runtime.config.where import SOURCE, Where
from m3runtime.memory.block import Ids, as_ids
from m3runtime.retrieval.restriction import meets
from m3runtime.storage.home import Home

_KEPT_BYTES = 64 * 1024**2
"""Bytes of ids that are kept: those of 8 million."""


class Members:
    """Finds the ids that have a place which meets some conditions, as the home is now. Thread-safe.

    Ids are kept until the home changes, those that were asked for last, and those of one filter in any case. Conditions
    on sources alone are answered by the home. For others the metadata of all references is read once, and after a
    change that of the sources which changed: see `Labels`.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._labels = Labels(home)
        self._lock = threading.Lock()
        self._kept: OrderedDict[Where, tuple[int, Ids]] = OrderedDict()

    def __call__(self, where: Where) -> Ids:
        """The ids, ascending. Names that no source or folder has are passed over."""
        revision = self._home.revision()  # before the ids are read: if it rises meanwhile, they are read again
        with self._lock:
            before, ids = self._kept.get(where, (-1, as_ids(())))
            if before == revision:
                self._kept.move_to_end(where)
                return ids
        is_of_sources = all(one.field == SOURCE for one in where)
        ids = self._of_sources(where) if is_of_sources else self._labels.ids(where, revision)
        with self._lock:
            self._kept[where] = revision, ids
            self._kept.move_to_end(where)
            while len(self._kept) > 1 and sum(kept.nbytes for _, kept in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
        return ids

    def _of_sources(self, where: Where) -> Ids:
        named = {name for one in where for name in one.values or ()}
        found = {name: ids for name in named if len(ids := self._home.ids_of(name))}
        if found.keys() != named or any(one.values is None for one in where):  # there are folders, or beginnings
            names = [name for name in self._home.sources() if meets(where, name, {})]
        else:
            names = [name for name in found if meets(where, name, {})]
        return np.unique(np.concatenate([as_ids(()), *(self._home.ids_of(name) for name in names)]))
