"""`Group`: references that become a batch which a home can commit, and `encoded`, which makes one of them at once."""

from collections.abc import Callable, Sequence

import torch

from m3runtime.adapter import Adapter
from m3runtime.bank import Bank, as_ids
from m3runtime.memory import Memories
from m3runtime.retrieval import Embedder, Vectors
from m3runtime.tier import Batch, Reference

GROUP = 64
"""References of one transaction. Always grouped alike, so that writing again after a crash gives equal bytes."""


class Group:
    """References under consecutive ids, whose blocks and embeddings are filled in. One thread at a time."""

    def __init__(self, bank: Bank, first_id: int, references: Sequence[Reference]) -> None:
        self.references = references
        self._bank = bank
        self._ids = as_ids(range(first_id, first_id + len(references)))
        self._blocks = torch.zeros(len(references), bank.home.slot_bytes, dtype=torch.uint8)
        self._vectors: Vectors | None = None

    def texts(self, rows: Sequence[int]) -> list[str]:
        """What the model reads for these rows."""
        return [self.references[row].text for row in rows]

    def put(self, rows: Sequence[int], memories: Memories) -> None:
        """Encode and seal the memories of these rows."""
        self._blocks[rows] = self._bank.blocks(self._ids[rows], memories)

    def embed(self, embedder: Embedder) -> None:
        """Embed all references."""
        self._vectors = embedder.embed_references([reference.text for reference in self.references])

    def batch(self) -> Batch:
        """What to commit. All memories were put, and the references embedded."""
        assert self._vectors is not None, "embed comes first"
        return Batch(self._ids, self._blocks, self.references, self._vectors)


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
    group = Group(bank, bank.home.next_id(), references)
    count = 0
    for rows in batches(references, batch_size):
        group.put(rows, adapter.encode(group.texts(rows)))
        done(count := count + len(rows))
    group.embed(embedder)
    return group.batch()
