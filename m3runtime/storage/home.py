"""The `Home` contract: the durable, complete tier of a bank."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from m3runtime.documents.reference import Reference
from m3runtime.memory.block import Found, Ids
from m3runtime.storage.tier import Tier

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """What one transaction adds to a home: rows of equal index belong together."""

    ids: Ids
    blocks: "Tensor"
    """``uint8[n, slot_bytes]``, sealed."""
    references: Sequence[Reference]
    embeddings: npt.NDArray[np.float32]
    """``float32[n, dim]``."""


@dataclass(frozen=True, slots=True)
class Damage:
    """One defect that was found in a bank."""

    where: str
    """The damaged part: ``block``, ``reference``, ``embedding``, ``home``, ``index``, ``codec`` or ``manifest``."""
    id: int | None
    """The memory concerned, or None for the bank as a whole."""
    what: str
    """A description of the defect, to be read after the two above."""


class Home(Tier):
    """The durable, complete tier: blocks, references, embeddings and metadata, committed together.

    What `commit` returned from survives a crash at any later instant; what it did not is wholly absent. The
    home is the only truth: index, caching tiers and statistics are rebuilt from it.

    A reference may be in the catalogue before it is encoded: it is then **cold**, remembered like any other but without
    a block, which `read` and `contains` miss. It gets its block once, and is cold never again.
    """

    @abstractmethod
    def commit(self, batch: Batch, *, replacing: Ids | None = None) -> None:
        """Add a batch in one transaction, and forget in the same one what it is ``replacing``, as `discard` does.

        Ids are new (`next_id` or above), texts not remembered yet, or only by what is replaced; else `InputError`.
        Raises `BankFullError` and `TierReadOnlyError`. After any error nothing was written.
        """

    @abstractmethod
    def catalogue(self, ids: Ids, references: Sequence[Reference], embeddings: npt.NDArray[np.float32]) -> None:
        """Add references that are not encoded yet, cold, in one transaction; else as `commit`.

        ``embeddings`` is ``float32[n, dim]``. Ids and texts are new; else `InputError`. Raises `BankFullError` and
        `TierReadOnlyError`. After any error nothing was written.
        """

    @abstractmethod
    def cold(self, ids: Ids | None = None) -> Ids:
        """Which of all ids, or of these, are cold: ascending, each once, quarantined ones left out."""

    @abstractmethod
    def fill(self, ids: Ids, blocks: "Tensor") -> Found:
        """Give cold ids their blocks (``uint8[n, slot_bytes]``, sealed) in one transaction. Returns which got one now.

        Ids that are not in `cold` are passed over, whatever the reason: none ever gets another block. Raises
        `InputError` for bytes that are no block of their id, `BankFullError` and `TierReadOnlyError`. After any error
        nothing was written.
        """

    @abstractmethod
    def next_id(self) -> int:
        """The id above all that were ever used: forgotten ids are not used again."""

    @abstractmethod
    def find(self, texts: Sequence[str]) -> list[int | None]:
        """The id that remembers exactly this text, or None."""

    @abstractmethod
    def references(self, ids: Ids) -> list[Reference | None]:
        """The references of ids, None where an id is unknown. Raises `RecordError` for one that is damaged."""

    @abstractmethod
    def ids(self) -> Ids:
        """All ids that are remembered, ascending, quarantined ones left out."""

    @abstractmethod
    def ids_of(self, source: str) -> Ids:
        """The ids whose reference came from this source, ascending."""

    @abstractmethod
    def sources(self) -> Mapping[str, int]:
        """How many references each source has."""

    @abstractmethod
    def embeddings(self, ids: Ids | None = None, batch: int = 4096) -> Iterator[tuple[Ids, npt.NDArray[np.float32]]]:
        """Embeddings in batches, ``ids[n]`` and ``float32[n, dim]``: of `ids()`, or of these where known.

        Raises `RecordError` for one that is damaged.
        """

    @abstractmethod
    def quarantine(self, id: int, reason: str) -> None:
        """Set a bad block apart: `read` misses it from now on, its reference stays for repair."""

    @abstractmethod
    def quarantined(self) -> Mapping[int, str]:
        """Ids set apart, and why."""

    @abstractmethod
    def get_meta(self, key: str) -> bytes | None:
        """A small value stored by `set_meta`, or None. Raises `RecordError` if it is damaged."""

    @abstractmethod
    def set_meta(self, key: str, value: bytes) -> None:
        """Store a small value durably, such as the manifest."""

    @abstractmethod
    def stored_bytes(self) -> int:
        """Bytes that the home takes on its drive."""

    def audit(self, progress: Callable[[int, int], None] | None = None) -> Iterator[Damage]:  # noqa: ARG002
        """Look for damage that the other methods alone do not show, such as records that disagree. Changes nothing.

        `m3 verify` reads every block itself, so their payloads are left out. ``progress`` is called with the steps
        done and all steps. The default finds nothing.
        """
        yield from ()
