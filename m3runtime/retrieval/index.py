"""The `Index` contract: nearest-neighbour search over embeddings."""

from abc import abstractmethod

import numpy as np
import numpy.typing as npt

from m3runtime.memory.block import Ids
from m3runtime.retrieval.derived import Derived
from m3runtime.retrieval.embedder import Embeddings


class Index(Derived):
    """Nearest-neighbour search by cosine: a cache of the home's embeddings. Thread-safe."""

    @abstractmethod
    def add(self, ids: Ids, vectors: Embeddings) -> None:
        """Add vectors; an id that is held already is passed over."""

    @abstractmethod
    def search(self, vectors: Embeddings, k: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32]]:
        """The nearest ``min(k, len(self))`` ids and their scores in [-1, 1] for each row, highest first: ``[n, <=k]``.

        Equal scores come in ascending order of ids.
        """

    @abstractmethod
    def search_among(
        self, ids: Ids, vectors: Embeddings, k: int
    ) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32]]:
        """`search` over these ids alone: what brute force over them finds, however many or few of all ids they are.

        ``ids`` are ascending, each once; those that are not held are passed over. All filters are applied by it, so
        it may be called for each chunk with nearly all ids: it takes no memory in proportion to their vectors.
        """
