"""The `Home` contract: the durable, complete tier of a bank."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from m3runtime.documents.reference import Place, Reference
from m3runtime.documents.sources import SourceState
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
class Changes:
    """Changes of places and of source states, made in one transaction."""

    places: Mapping[int, tuple[Place, ...]] = field(default_factory=dict)
    """All places that each of these ids has from now on. A reference without a place is forgotten."""
    states: Mapping[str, SourceState | None] = field(default_factory=dict)
    """The states of these sources; None: none is known."""


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

    A home may have one writer at a time, or several: processes, maybe on several machines, each with the home open. All
    laws hold for each of them, as if their transactions came one after the other.

    `read` fills a row to its end, with zeros behind the block: tiers keep whole slots, maybe in files, and a buffer may
    have bytes of a block that was forgotten.

    A reference may be in the catalogue before it is encoded. It is **cold** then: remembered like any other, without a
    block, so `read` and `contains` miss it. It gets its block once, and is never cold again.

    A reference has one or more places, and is a member of the source of each. The *state* of a source says that the
    home holds exactly what the source held then. So a transaction that adds, moves or forgets a member of a source
    removes the state of that source, unless it states another one. The last day and the tags of a removed state stay,
    as `SourceState.voided`.
    """

    @abstractmethod
    def commit(self, batch: Batch, *, replacing: Ids | None = None, changes: Changes | None = None) -> None:
        """Make ``changes``, add a batch, and `discard` the ids that it is ``replacing``, in one transaction.

        Ids are new (reserved, or `next_id` or above), no other id remembers the heading and text of one, and each has a
        place; else `InputError`, as for `change`. Raises `BankFullError` and `TierReadOnlyError`. After any error
        nothing was written.
        """

    @abstractmethod
    def catalogue(
        self,
        ids: Ids,
        references: Sequence[Reference],
        embeddings: npt.NDArray[np.float32],
        *,
        changes: Changes | None = None,
    ) -> None:
        """Add cold references, which are not encoded yet, and make ``changes``, in one transaction.

        ``embeddings`` is ``float32[n, dim]``. The errors are those of `commit`.
        """

    @abstractmethod
    def change(self, changes: Changes) -> None:
        """Change places and states in one transaction. Text, heading, block and embedding stay as they are.

        Raises `InputError` for other places of an id that is not remembered, `BankFullError` and `TierReadOnlyError`.
        After any error nothing was written.
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
        """The id above all that were ever used, or reserved in a home that several may write; none is used again."""

    @abstractmethod
    def unused(self) -> int:
        """The number of ids below `next_id` under which nothing was ever stored: reserved only, or passed over."""

    @abstractmethod
    def reserve(self, count: int) -> int:
        """Reserve ``count`` consecutive ids, and return the first: no other call reserves one of them, in any process.

        They are committed in ascending order by this home, or by none. Raises `BankFullError` and `TierReadOnlyError`.
        """

    @abstractmethod
    def find(self, texts: Sequence[str], headings: Sequence[str] | None = None) -> list[int | None]:
        """For each text the id of the reference with exactly this text and heading, or None.

        Without ``headings`` it finds references that have none.
        """

    @abstractmethod
    def references(self, ids: Ids) -> list[Reference | None]:
        """The reference of each id, or None for an unknown id. Raises `RecordError` for a damaged one."""

    @abstractmethod
    def ids(self) -> Ids:
        """All remembered ids, ascending, without quarantined ones."""

    @abstractmethod
    def ids_of(self, source: str) -> Ids:
        """The ids of the references that have a place in this source, ascending."""

    @abstractmethod
    def sources(self) -> Mapping[str, int]:
        """The number of references of each source that has any."""

    @abstractmethod
    def states(self) -> Mapping[str, SourceState]:
        """The states that are known, by source. A damaged one is left out: its source is read anew."""

    @abstractmethod
    def expiring(self, before: str | None = None) -> Mapping[str, Ids]:
        """Maps each last day of a place (`Place.expires`) to the references with such a place, both ascending.

        With ``before`` only earlier days. Quarantined and cold references are among them; damaged ones may be left out.
        """

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
    def revision(self) -> int:
        """A number that rises with every transaction that changes the home, whichever process makes it."""

    @abstractmethod
    def widen(self, slot_bytes: int) -> None:
        """Make slots larger, durably: ``self.slot_bytes`` is that many then. Blocks stay as they are.

        Homes that other processes have open keep their slots; a longer block is a bad block to them. Raises
        `InputError` for fewer bytes than a slot has, `BankFullError` and `TierReadOnlyError`.
        """

    @abstractmethod
    def stored_bytes(self) -> int:
        """Bytes that the home takes on its drive."""

    @abstractmethod
    def compact(self) -> None:
        """Leave no byte of what was forgotten in any file of the home, and give its room back to the drive.

        Nothing else changes: ids, blocks and all other contents stay. Killed at any instant, the home is as it was,
        or compacted. Others may read meanwhile. Raises `BankFullError` if there is no room to do it, and
        `TierReadOnlyError`; nothing has changed then.
        """

    def audit(self, progress: Callable[[int, int], None] | None = None) -> Iterator[Damage]:  # noqa: ARG002
        """Look for damage that the other methods alone do not show, such as records that disagree. Changes nothing.

        `m3 verify` reads every block itself, so their payloads are left out. ``progress`` is called with the steps
        done and all steps. The default finds nothing.
        """
        yield from ()
