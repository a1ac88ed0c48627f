"""`Members`: the ids of sources, as a restriction names them."""

import threading
from collections import OrderedDict

import numpy as np

from m3runtime.documents.sources import is_within
from m3runtime.memory.block import Ids, as_ids
from m3runtime.storage.home import Home

_KEPT = 256
"""Sets of sources whose ids are kept, the latest ones."""


class Members:
    """Finds the ids that have a place in one of some sources, or folders of sources, as the home is now. Thread-safe.

    Ids are kept until the home changes.
    """

    def __init__(self, home: Home) -> None:
        self._home = home
        self._lock = threading.Lock()
        self._kept: OrderedDict[frozenset[str], tuple[int, Ids]] = OrderedDict()

    def __call__(self, sources: frozenset[str]) -> Ids:
        """The ids, ascending. Names that no source or folder has are passed over."""
        revision = self._home.revision()  # before the ids are read: if it rises meanwhile, they are read again
        with self._lock:
            before, ids = self._kept.get(sources, (-1, as_ids(())))
        if before == revision:
            return ids
        names, folders = set[str](), set[str]()
        for source in sources:
            (names if len(self._home.ids_of(source)) else folders).add(source)
        if folders:
            names |= {name for name in self._home.sources() if any(is_within(name, one) for one in folders)}
        ids = np.unique(np.concatenate([as_ids(()), *(self._home.ids_of(name) for name in names)]))
        with self._lock:
            self._kept[sources] = revision, ids
            self._kept.move_to_end(sources)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return ids
