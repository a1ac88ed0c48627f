"""`HomeIndex`: the contract of an index that lies in the home."""

from abc import abstractmethod
from pathlib import Path

from m3runtime.errors import IndexFileError
from m3runtime.memory.block import Ids
from m3runtime.retrieval.embedder import Embeddings
from m3runtime.retrieval.index import Index
from m3runtime.storage.home import Home


class HomeIndex(Index):
    """An index that the home keeps with the embeddings themselves. It has no file, and takes ids without vectors.

    It finds the ids that it holds, which are told to it as to any index: a search does not see what was committed
    since. So what a process has in memory and what it finds change together.
    """

    @abstractmethod
    def attach(self, home: Home) -> None:
        """Search this home. Called once, before anything else. Raises `ConfigError` for a home of another kind."""

    @abstractmethod
    def hold(self, ids: Ids) -> None:
        """`add` ids whose vectors are in the home."""

    @abstractmethod
    def update(self) -> None:
        """Build the index, or bring it up to date, where that makes searches faster. Never needed to find anything.

        Raises `BankFullError` and `TierReadOnlyError`.
        """

    @abstractmethod
    def rebuild(self) -> None:
        """Build the index anew, so that it has nothing of what the home has forgotten. Raises as `update`."""

    def add(self, ids: Ids, vectors: Embeddings) -> None:  # noqa: ARG002
        """`hold` these ids: the home has their vectors."""
        self.hold(ids)

    def save(self, path: Path) -> None:
        """Refused: there is no file."""
        raise IndexFileError(f"{path}: this index lies in the home, and has no file")

    def load(self, data: memoryview) -> None:  # noqa: ARG002
        """Refused: there is no file."""
        raise IndexFileError("this index lies in the home, and has no file")
