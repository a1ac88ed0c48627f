"""`Encoding`: references with their blocks and embeddings; `Group`: an encoding on its way into a home."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from m3runtime.adapters.base import Adapter
from m3runtime.bank.bank import Bank
from m3runtime.bank.codecs import BankCodecs
from m3runtime.bank.manifest import Manifest
from m3runtime.documents.reference import Place, Reference
from m3runtime.documents.sources import SourceState
from m3runtime.memory.block import HEADER_BYTES, Ids, headers
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.retrieval.embedder import Embedder, Embeddings
from m3runtime.storage.home import Batch, Changes

GROUP = 64
"""References of one transaction. A constant, so that writing again after a crash gives equal bytes."""


@dataclass(eq=False)
class Encoding:
    """References with their ids; blocks and embeddings are filled in. For one thread at a time."""

    codecs: BankCodecs
    slot_bytes: int
    ids: Ids
    references: Sequence[Reference]
    vectors: Embeddings = field(init=False)
    """The embeddings of all references, ``float32[n, dim]``, after `embed`."""

    @cached_property
    def blocks(self) -> Tensor:
        """The encoded blocks of all references, ``uint8[n, slot_bytes]``; zeros before `put`."""
        return torch.zeros(len(self.ids), self.slot_bytes, dtype=torch.uint8)

    def texts(self, rows: Sequence[int], adapter: Adapter) -> list[str]:
        """The texts of these rows, as the model reads them."""
        return read_texts(self.codecs.manifest, adapter, [self.references[row] for row in rows])

    def put(self, rows: Sequence[int], memories: MemoryTensors) -> None:
        """Encode and seal the memories of these rows."""
        self.blocks[rows] = self.codecs.seal(self.ids[rows], memories, self.slot_bytes)

    def encode(self, adapter: Adapter, batch_size: int, done: Callable[[int], None] = lambda _: None) -> None:
        """Compute, encode and seal all memories. ``done`` is called with their number after each batch of the model."""
        count = 0
        for rows in batches(self.references, batch_size):
            self.put(rows, adapter.encode(self.texts(rows, adapter)))
            done(count := count + len(rows))

    @property
    def bytes(self) -> int:
        """The bytes of all blocks, without what follows them in their slots."""
        return len(self.blocks) * HEADER_BYTES + int(headers(self.blocks.numpy())["payload"].sum())

    def embed(self, embedder: Embedder) -> None:
        """Embed all references, each with its heading."""
        self.vectors = embedder.embed_references([reference.headed for reference in self.references])


class Group(Encoding):
    """References of a bank, and the transactions that may store them."""

    def __init__(self, bank: Bank, ids: Ids, references: Sequence[Reference], changes: Changes | None = None) -> None:
        """``changes`` of other references are made in the same transaction."""
        super().__init__(bank.codecs, bank.home.slot_bytes, ids, references)
        self.bank = bank
        self.changes = changes or Changes()

    @classmethod
    def joined(cls, groups: "Sequence[Group]") -> "Group":
        """One group of several computed ones, to commit them in one transaction as they would be one by one."""
        if len(groups) == 1:
            return groups[0]
        places: dict[int, tuple[Place, ...]] = {}
        states: dict[str, SourceState | None] = {}
        for group in groups:
            places.update(group.changes.places)
            states.update(group.changes.states)
        references = [reference for group in groups for reference in group.references]
        whole = cls(
            groups[0].bank, np.concatenate([group.ids for group in groups]), references, Changes(places, states)
        )
        whole.blocks = torch.cat([group.blocks for group in groups])
        whole.vectors = np.concatenate([group.vectors for group in groups])
        return whole

    def batch(self) -> Batch:
        """The batch for `Home.commit`, after `put` for every row and `embed`."""
        return Batch(self.ids, self.blocks, self.references, self.vectors)

    def commit(self) -> None:
        """Commit new references with their blocks in one transaction."""
        self.bank.home.commit(self.batch(), changes=self.changes)

    def catalogue(self) -> None:
        """Commit new references without blocks, cold, in one transaction."""
        self.bank.home.catalogue(self.ids, self.references, self.vectors, changes=self.changes)

    def change(self) -> None:
        """Make the changes alone; the group has no references."""
        self.bank.home.change(self.changes)

    def fill(self) -> None:
        """Store the blocks of cold references in one transaction."""
        self.bank.home.fill(self.ids, self.blocks)


Store = Callable[[Group], None]
"""A transaction of `Group`: `Group.commit`, `Group.catalogue`, `Group.fill` or `Group.change`."""


def read_texts(manifest: Manifest, adapter: Adapter, references: Iterable[Reference]) -> list[str]:
    """The texts that the model reads of references: below their headings, if the bank's are (`Manifest.headings`)."""
    if not manifest.headings:
        return [one.text for one in references]
    return [one.headed_within(adapter.spec.reference_tokens, adapter.count_tokens) for one in references]


def batches(references: Sequence[Reference], size: int) -> list[list[int]]:
    """The rows of a group that the model reads together, at most ``size`` at once.

    Batches of references of like length waste little on padding; rows and ids keep the references' order.
    """
    order = sorted(range(len(references)), key=lambda row: (references[row].tokens, row))
    return [order[start : start + size] for start in range(0, len(order), size)]


def blocks_of(bank: Bank, adapter: Adapter, ids: Ids, references: Sequence[Reference], batch_size: int) -> Tensor:
    """The sealed blocks of references under these ids, ``uint8[n, slot_bytes]``: computed, encoded, not committed."""
    group = Group(bank, ids, references)
    group.encode(adapter, batch_size)
    return group.blocks
