"""`Group`: references that become a batch which a home can commit, and what makes one of them at once."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from m3runtime.adapters.base import Adapter
from m3runtime.bank.bank import Bank
from m3runtime.documents.reference import Reference
from m3runtime.memory.block import Ids, as_ids
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.retrieval.embedder import Embedder, Embeddings
from m3runtime.storage.home import Batch

GROUP = 64
"""References of one transaction. Always grouped alike, so that writing again after a crash gives equal bytes."""


class Group:
    """References under their ids, whose blocks and embeddings are filled in. One thread at a time."""

    def __init__(self, bank: Bank, ids: Ids, references: Sequence[Reference]) -> None:
        self.ids = ids
        self.references = references
        self._bank = bank
        self._blocks: Tensor | None = None
        self._vectors: Embeddings | None = None

    def texts(self, rows: Sequence[int]) -> list[str]:
        """What the model reads for these rows."""
        return [self.references[row].text for row in rows]

    def put(self, rows: Sequence[int], memories: MemoryTensors) -> None:
        """Encode and seal the memories of these rows."""
        if self._blocks is None:
            self._blocks = torch.zeros(len(self.ids), self._bank.home.slot_bytes, dtype=torch.uint8)
        self._blocks[rows] = self._bank.blocks(self.ids[rows], memories)

    def embed(self, embedder: Embedder) -> None:
        """Embed all references."""
        self._vectors = embedder.embed_references([reference.text for reference in self.references])

    @property
    def blocks(self) -> Tensor:
        """Those of all references, whose memories were put."""
        assert self._blocks is not None, "put comes first"
        return self._blocks

    @property
    def vectors(self) -> Embeddings:
        """The embeddings, once they are there."""
        assert self._vectors is not None, "embed comes first"
        return self._vectors

    def batch(self) -> Batch:
        """What to commit. All memories were put, and the references embedded."""
        return Batch(self.ids, self.blocks, self.references, self.vectors)

    def commit(self) -> None:
        """Remember new references, with their blocks."""
        self._bank.home.commit(self.batch())

    def catalogue(self) -> None:
        """Remember new references, cold."""
        self._bank.home.catalogue(self.ids, self.references, self.vectors)

    def fill(self) -> None:
        """Store the blocks of references that are cold."""
        self._bank.home.fill(self.ids, self.blocks)


Store = Callable[[Group], None]
"""A transaction of `Group`: `Group.commit`, `Group.catalogue` or `Group.fill`."""


def batches(references: Sequence[Reference], size: int) -> list[list[int]]:
    """Which rows of a group the model reads together, ``size`` at most.

    Batches of references of like length waste little on padding; rows and ids keep the references' order.
    """
    order = sorted(range(len(references)), key=lambda row: (references[row].tokens, row))
    return [order[start : start + size] for start in range(0, len(order), size)]


def encoded(
    bank: Bank,
    adapter: Adapter,
    embedder: Embedder,
    references: Sequence[Reference],
    batch_size: int,
    done: Callable[[int], None],
) -> Batch:
    """Compute memories and embeddings of references, under the bank's next ids, and seal the blocks.

    ``done`` is called with how many are computed, after every ``batch_size`` of them.
    """
    first_id = bank.home.next_id()
    group = Group(bank, as_ids(range(first_id, first_id + len(references))), references)
    _compute(group, adapter, batch_size, done)
    group.embed(embedder)
    return group.batch()


def blocks_of(bank: Bank, adapter: Adapter, ids: Ids, references: Sequence[Reference], batch_size: int) -> Tensor:
    """Compute the memories of references under these ids: their blocks, sealed, ``uint8[n, slot_bytes]``."""
    group = Group(bank, ids, references)
    _compute(group, adapter, batch_size, lambda _: None)
    return group.blocks


def _compute(group: Group, adapter: Adapter, batch_size: int, done: Callable[[int], None]) -> None:
    count = 0
    for rows in batches(group.references, batch_size):
        group.put(rows, adapter.encode(group.texts(rows)))
        done(count := count + len(rows))
