"""`WrappedTier` and `WrappedHome`: pass every call on to an inner tier, through one method to override."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from m3runtime.documents.reference import Reference
from m3runtime.documents.sources import SourceState
from m3runtime.memory.block import Found, Ids
from m3runtime.storage.abilities import Persistent
from m3runtime.storage.home import Batch, Changes, Damage, Home
from m3runtime.storage.tier import CachingTier, Scores, Tier

T = TypeVar("T")
InnerT = TypeVar("InnerT", bound=Tier)


class Wrapped(Tier, Generic[InnerT]):
    """The base of both. ``inner`` may be a wrapper too: they compose in any order."""

    def __init__(self, inner: InnerT) -> None:
        self.inner = inner
        self.name = inner.name
        self.slot_bytes = inner.slot_bytes

    def around(self, method: str, work: Callable[[], T]) -> T:  # noqa: ARG002 - for those who override it
        """Every call comes through here: ``work`` calls the inner tier's ``method`` (``len`` for `__len__`)."""
        return work()

    def read(self, ids: Ids, out: Tensor) -> Found:
        return self.around("read", lambda: self.inner.read(ids, out))

    def write(self, ids: Ids, blocks: Tensor) -> None:
        self.around("write", lambda: self.inner.write(ids, blocks))

    def discard(self, ids: Ids) -> None:
        self.around("discard", lambda: self.inner.discard(ids))

    def contains(self, ids: Ids) -> Found:
        return self.around("contains", lambda: self.inner.contains(ids))

    def __len__(self) -> int:
        return self.around("len", lambda: len(self.inner))

    @property
    def capacity(self) -> int | None:
        return self.inner.capacity

    def close(self) -> None:
        self.around("close", self.inner.close)


class WrappedTier(Wrapped[CachingTier], CachingTier):
    """A caching tier around another. It has the ability ``ids`` if the inner one has it."""

    def __init__(self, inner: CachingTier) -> None:
        super().__init__(inner)
        self.device = inner.device
        self.can_rot = inner.can_rot
        if isinstance(inner, Persistent):  # of the object, since a method of the class would be an ability of all
            self.ids: Callable[[], Ids] = lambda: self.around("ids", inner.ids)

    def score(self, ids: Ids, scores: Scores) -> None:
        self.around("score", lambda: self.inner.score(ids, scores))


class WrappedHome(Wrapped[Home], Home):
    """A home around another."""

    def audit(self, progress: Callable[[int, int], None] | None = None) -> Iterator[Damage]:
        return self.around("audit", lambda: self.inner.audit(progress))

    def compact(self) -> None:
        self.around("compact", self.inner.compact)

    def commit(self, batch: Batch, *, replacing: Ids | None = None, changes: Changes | None = None) -> None:
        self.around("commit", lambda: self.inner.commit(batch, replacing=replacing, changes=changes))

    def catalogue(
        self,
        ids: Ids,
        references: Sequence[Reference],
        embeddings: npt.NDArray[np.float32],
        *,
        changes: Changes | None = None,
    ) -> None:
        self.around("catalogue", lambda: self.inner.catalogue(ids, references, embeddings, changes=changes))

    def change(self, changes: Changes) -> None:
        self.around("change", lambda: self.inner.change(changes))

    def cold(self, ids: Ids | None = None) -> Ids:
        return self.around("cold", lambda: self.inner.cold(ids))

    def fill(self, ids: Ids, blocks: Tensor) -> Found:
        return self.around("fill", lambda: self.inner.fill(ids, blocks))

    def next_id(self) -> int:
        return self.around("next_id", self.inner.next_id)

    def unused(self) -> int:
        return self.around("unused", self.inner.unused)

    def reserve(self, count: int) -> int:
        return self.around("reserve", lambda: self.inner.reserve(count))

    def find(self, texts: Sequence[str], headings: Sequence[str] | None = None) -> list[int | None]:
        return self.around("find", lambda: self.inner.find(texts, headings))

    def references(self, ids: Ids) -> list[Reference | None]:
        return self.around("references", lambda: self.inner.references(ids))

    def ids(self) -> Ids:
        return self.around("ids", self.inner.ids)

    def ids_of(self, source: str) -> Ids:
        return self.around("ids_of", lambda: self.inner.ids_of(source))

    def sources(self) -> Mapping[str, int]:
        return self.around("sources", self.inner.sources)

    def states(self) -> Mapping[str, SourceState]:
        return self.around("states", self.inner.states)

    def expiring(self, before: str | None = None) -> Mapping[str, Ids]:
        return self.around("expiring", lambda: self.inner.expiring(before))

    def embeddings(self, ids: Ids | None = None, batch: int = 4096) -> Iterator[tuple[Ids, npt.NDArray[np.float32]]]:
        return self.around("embeddings", lambda: self.inner.embeddings(ids, batch))

    def quarantine(self, id: int, reason: str) -> None:
        self.around("quarantine", lambda: self.inner.quarantine(id, reason))

    def quarantined(self) -> Mapping[int, str]:
        return self.around("quarantined", self.inner.quarantined)

    def get_meta(self, key: str) -> bytes | None:
        return self.around("get_meta", lambda: self.inner.get_meta(key))

    def set_meta(self, key: str, value: bytes) -> None:
        self.around("set_meta", lambda: self.inner.set_meta(key, value))

    def revision(self) -> int:
        return self.around("revision", self.inner.revision)

    def widen(self, slot_bytes: int) -> None:
        self.around("widen", lambda: self.inner.widen(slot_bytes))
        self.slot_bytes = self.inner.slot_bytes

    def stored_bytes(self) -> int:
        return self.around("stored_bytes", self.inner.stored_bytes)
