"""`encoded`: references as a batch that a home can commit."""

from collections.abc import Callable, Sequence

import torch

from m3runtime.adapter import Adapter
from m3runtime.bank import Bank, as_ids
from m3runtime.retrieval import Embedder
from m3runtime.tier import Batch, Reference

GROUP = 64
"""References of one transaction. Always grouped alike, so that writing again after a crash gives equal bytes."""


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
    first = bank.home.next_id()
    ids = as_ids(range(first, first + len(references)))
    blocks = torch.zeros(len(references), bank.home.slot_bytes, dtype=torch.uint8)
    # Batches of references of like length waste little on padding; rows and ids keep the references' order.
    order = sorted(range(len(references)), key=lambda i: (references[i].tokens, i))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        memories = adapter.encode([references[i].text for i in rows])
        blocks[rows] = bank.blocks(ids[rows], memories)
        done(start + len(rows))
    vectors = embedder.embed_references([reference.text for reference in references])
    return Batch(ids, blocks, references, vectors)
