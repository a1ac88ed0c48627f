"""`Derived`: the part that all indexes of a bank have in common."""

from abc import ABC, abstractmethod
from pathlib import Path

from m3runtime.memory.block import Ids


class Derived(ABC):
    """A cache of what the home has of each reference, by id. It can be deleted, and is rebuilt. Thread-safe."""

    @abstractmethod
    def remove(self, ids: Ids) -> None:
        """Remove ids; unknown ones are passed over."""

    @abstractmethod
    def ids(self) -> Ids:
        """All ids held, ascending."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def save(self, path: Path) -> None:
        """Write what is held at one instant into the file ``path``, whatever it holds now.

        Whole files, digests and atomic replacement are the caller's: see `m3runtime.bank.index`. Raises `OSError` or
        `IndexFileError` if the file cannot be written.
        """

    @abstractmethod
    def load(self, data: memoryview) -> None:
        """Replace everything held by the bytes that `save` wrote. ``data`` stays valid while it is referenced.

        Called only with bytes that this kind of index wrote. Raises `IndexFileError`, with nothing changed, if they
        are of another release or form.
        """
