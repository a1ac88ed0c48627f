"""`Group`: references on their way into a home, with their blocks and embeddings."""

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
"""References of one transaction. A constant, so that writing again after a crash gives equal bytes."""


class Group:
    """References with their ids; blocks and embeddings are filled in. For one thread at a time."""

    def __init__(self, bank: Bank, ids: Ids, references: Sequence[Reference]) -> None:
        self.ids = ids
        self.references = references
        self._bank = bank
        self._blocks: Tensor | None = None
        self._vectors: Embeddings | None = None

    def texts(self, rows: Sequence[int]) -> list[str]:
        """The texts of these rows."""
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
        """The encoded blocks of all references, ``uint8[n, slot_bytes]``, after `put` for every row."""
        assert self._blocks is not None, "put comes first"
        return self._blocks

    @property
    def vectors(self) -> Embeddings:
        """The embeddings of all references, ``float32[n, dim]``, after `embed`."""
        assert self._vectors is not None, "embed comes first"
        return self._vectors

    def batch(self) -> Batch:
        """The batch for `Home.commit`, after `put` for every row and `embed`."""
        return Batch(self.ids, self.blocks, self.references, self.vectors)

    def commit(self) -> None:
        """Commit new references with their blocks in one transaction."""
        self._bank.home.commit(self.batch())

    def catalogue(self) -> None:
        """Commit new references without blocks, cold, in one transaction."""
        self._bank.home.catalogue(self.ids, self.references, self.vectors)

    def fill(self) -> None:
        """Store the blocks of cold references in one transaction."""
        self._bank.home.fill(self.ids, self.blocks)


Store = Callable[[Group], None]
"""A transaction of `Group`: `Group.commit`, `Group.catalogue` or `Group.fill`."""


def batches(references: Sequence[Reference], size: int) -> list[list[int]]:
    """The rows of a group that the model reads together, at most ``size`` at once.

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
    """A batch for `Home.commit`: memories, as sealed blocks, and embeddings of references under the bank's next ids.

    ``done`` is called with the number of references computed so far, after each batch of the model.
    """
    first_id = bank.home.next_id()
    group = Group(bank, as_ids(range(first_id, first_id + len(references))), references)
    _compute(group, adapter, batch_size, done)
    group.embed(embedder)
    return group.batch()


def blocks_of(bank: Bank, adapter: Adapter, ids: Ids, references: Sequence[Reference], batch_size: int) -> Tensor:
    """The sealed blocks of references under these ids, ``uint8[n, slot_bytes]``: computed, encoded, not committed."""
    group = Group(bank, ids, references)
    _compute(group, adapter, batch_size, lambda _: None)
    return group.blocks


def _compute(group: Group, adapter: Adapter, batch_size: int, done: Callable[[int], None]) -> None:
    count = 0
    for rows in batches(group.references, batch_size):
        group.put(rows, adapter.encode(group.texts(rows)))
        done(count := count + len(rows))
