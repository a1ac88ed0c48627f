"""The `Index` contract: nearest-neighbour search over embeddings."""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from m3runtime.memory.block import Ids
from m3runtime.retrieval.embedder import Embeddings


class Index(ABC):
    """Nearest-neighbour search by cosine: a cache of the home's embeddings. Thread-safe."""

    @abstractmethod
    def add(self, ids: Ids, vectors: Embeddings) -> None:
        """Add vectors; an id that is held already is passed over."""

    @abstractmethod
    def remove(self, ids: Ids) -> None:
        """Remove ids; unknown ones are passed over."""

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

    @abstractmethod
    def ids(self) -> Ids:
        """All ids held, ascending."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write the vectors held at one instant into the file ``path``, whatever it holds now.

        Whole files, digests and atomic replacement are the caller's: see `m3runtime.bank.index`. Raises `OSError` or
        `IndexFileError` if the file cannot be written.
        """

    @abstractmethod
    def load(self, data: memoryview) -> None:
        """Replace everything held by the bytes that `save` wrote. ``data`` stays valid while it is referenced.

        Called only with bytes that this kind of index wrote. Raises `IndexFileError`, with nothing changed, if they
        are of another release, dim or dtype.
        """
