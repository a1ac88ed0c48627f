"""The `Index` contract: nearest-neighbour search over embeddings."""

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import numpy.typing as npt

from m3runtime.memory.block import Ids
from m3runtime.retrieval.embedder import Embeddings


class Index(ABC):
    """Nearest vectors by cosine. A cache of the home's embeddings. Thread-safe."""

    @abstractmethod
    def add(self, ids: Ids, vectors: Embeddings) -> None:
        """Add vectors; an id that is there already is passed over."""

    @abstractmethod
    def remove(self, ids: Ids) -> None:
        """Remove ids; unknown ones are passed over."""

    @abstractmethod
    def search(self, vectors: Embeddings, k: int) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.float32]]:
        """The nearest ``min(k, len(self))`` ids and their scores in [-1, 1] for each row, highest first: ``[n, <=k]``.

        Equal scores come in ascending order of ids.
        """

    @abstractmethod
    def ids(self) -> Ids:
        """All ids held, ascending."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def save(self, path: Path, stamp: str) -> None:
        """Write the index by temporary file and rename; ``stamp`` names the bank and embedder it belongs to."""

    @abstractmethod
    def load(self, path: Path, stamp: str) -> None:
        """Read what `save` wrote. Raises `IndexFileError` if it is absent, damaged, or of another stamp."""
