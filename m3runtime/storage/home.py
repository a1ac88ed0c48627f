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
    """The additions of one transaction: rows of equal index belong together."""

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

    A batch survives a crash at any instant after `commit` returned; before that it is wholly absent. The home is the
    only truth: index, caching tiers and statistics are rebuilt from it.

    A reference may be in the catalogue before it is encoded. It is **cold** then: remembered like any other, without a
    block, so `read` and `contains` miss it. It gets its block once, and is never cold again.
    """

    @abstractmethod
    def commit(self, batch: Batch, *, replacing: Ids | None = None) -> None:
        """Add a batch, and `discard` the ids that it is ``replacing``, in one transaction.

        Ids are new (`next_id` or above), and no other id remembers one of the texts; else `InputError`. Raises
        `BankFullError` and `TierReadOnlyError`. After any error nothing was written.
        """

    @abstractmethod
    def catalogue(self, ids: Ids, references: Sequence[Reference], embeddings: npt.NDArray[np.float32]) -> None:
        """Add cold references, which are not encoded yet, in one transaction.

        ``embeddings`` is ``float32[n, dim]``. Ids and texts are new; else `InputError`. Raises `BankFullError` and
        `TierReadOnlyError`. After any error nothing was written.
        """

    @abstractmethod
    def cold(self, ids: Ids | None = None) -> Ids:
        """The cold ids among all, or among these: ascending, each once, without quarantined ones."""

    @abstractmethod
    def fill(self, ids: Ids, blocks: "Tensor") -> Found:
        """Give cold ids their blocks (``uint8[n, slot_bytes]``, sealed) in one transaction; true where one got it.

        Ids that are not in `cold` are passed over, for whatever reason: no id ever gets another block. Raises
        `InputError` for bytes that are no block of their id, `BankFullError` and `TierReadOnlyError`. After any error
        nothing was written.
        """

    @abstractmethod
    def next_id(self) -> int:
        """The id above all that were ever used; forgotten ids are not used again."""

    @abstractmethod
    def find(self, texts: Sequence[str]) -> list[int | None]:
        """For each text the id of the reference with exactly this text, or None."""

    @abstractmethod
    def references(self, ids: Ids) -> list[Reference | None]:
        """The reference of each id, or None for an unknown id. Raises `RecordError` for a damaged one."""

    @abstractmethod
    def ids(self) -> Ids:
        """All remembered ids, ascending, without quarantined ones."""

    @abstractmethod
    def ids_of(self, source: str) -> Ids:
        """The ids of the references from this source, ascending."""

    @abstractmethod
    def sources(self) -> Mapping[str, int]:
        """The number of references of each source."""

    @abstractmethod
    def embeddings(self, ids: Ids | None = None, batch: int = 4096) -> Iterator[tuple[Ids, npt.NDArray[np.float32]]]:
        """Embeddings of `ids()`, or of these where known, in batches: ``ids[n]`` and ``float32[n, dim]``.

        Raises `RecordError` for a damaged one.
        """

    @abstractmethod
    def quarantine(self, id: int, reason: str) -> None:
        """Set a bad block aside: `read` misses it from now on; its reference stays for repair."""

    @abstractmethod
    def quarantined(self) -> Mapping[int, str]:
        """Maps each quarantined id to the reason."""

    @abstractmethod
    def get_meta(self, key: str) -> bytes | None:
        """The small value that `set_meta` stored, or None. Raises `RecordError` if it is damaged."""

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
