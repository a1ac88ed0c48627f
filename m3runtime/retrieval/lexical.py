"""The `LexicalIndex` contract: search by words."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from m3runtime.memory.block import Ids
from m3runtime.retrieval.derived import Derived

Hits = tuple[Ids, npt.NDArray[np.float32]]
"""Ids and their scores, the highest first."""


class LexicalIndex(Derived):
    """Search by the words that texts have in common: a cache of the home's texts. Thread-safe.

    It finds names, numbers and codes, which embeddings blur. Texts in scripts without spaces, such as Chinese, are
    found by a part of them. What was removed leaves no bytes in a file that is saved after it.
    """

    @abstractmethod
    def add(self, ids: Ids, texts: Sequence[str]) -> None:
        """Add texts; an id that is held already is passed over."""

    @abstractmethod
    def search(self, texts: Sequence[str], k: int, among: Ids | None = None) -> list[Hits]:
        """At most ``k`` ids for each text that share a word with it, and their scores above 0.

        Equal scores come in ascending order of ids. Results do not depend on the order in which texts were added, nor
        on texts that were removed. ``among`` is ascending, each id once: no other id is found, and the scores are the
        same as without it.
        """
