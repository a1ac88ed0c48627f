"""Blocks, references and batches for tests: the same for the same id, different for any two ids."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from m3runtime.documents.reference import Place, Reference
from m3runtime.memory.block import HEADER_BYTES, BlockStamp, Ids, length, seal
from m3runtime.storage.home import Batch

STAMP = BlockStamp(bank="0b" * 16, codec="0c" * 16)
SLOT_BYTES = 256
DIM = 8
LAST_ID = 2**64 - 1


def make_ids(*ids: int) -> Ids:
    """``uint64[n]``."""
    return np.array(ids, np.uint64)


def make_blocks(ids: Ids, slot_bytes: int = SLOT_BYTES, stamp: BlockStamp = STAMP, edition: int = 0) -> Tensor:
    """Sealed blocks of many lengths, ``uint8[n, slot_bytes]``; the rest of each slot is noise.

    Another ``edition`` of an id is what no tier should ever be given: other bytes that claim to be the same block.
    """
    blocks = np.empty((len(ids), slot_bytes), np.uint8)
    for block, id in zip(blocks, ids.tolist(), strict=True):
        noise = np.random.default_rng([id, edition] if edition else id)
        block[:] = noise.integers(0, 256, slot_bytes, np.uint8)
        payload = int(noise.integers(0, slot_bytes - HEADER_BYTES, endpoint=True))
        seal(block, id=id, tokens=1, payload_bytes=payload, stamp=stamp)
    return torch.from_numpy(blocks)


def make_reference(id: int) -> Reference:
    """A reference; every third shares its source. Sources and texts hold what JSON and UTF-8 find hard."""
    text = f'Reference {id} says "naïve" \N{CLOUD} \\ \n to all.'
    return Reference(text, tokens=7, places=(Place(f"notes/{id % 3}\udcff.md", 3, 3 + len(text)),))


def make_embeddings(ids: Ids) -> "np.typing.NDArray[np.float32]":
    """``float32[n, DIM]``."""
    rows = [np.random.default_rng(id).standard_normal(DIM, np.float32) for id in ids.tolist()]
    return np.array(rows, np.float32).reshape(len(ids), DIM)


def make_batch(ids: Iterable[int], slot_bytes: int = SLOT_BYTES) -> Batch:
    """All that `Home.commit` takes for these ids."""
    wanted = make_ids(*ids)
    return Batch(
        wanted,
        make_blocks(wanted, slot_bytes),
        [make_reference(id) for id in wanted.tolist()],
        make_embeddings(wanted),
    )


def stored_bytes(block: Tensor) -> bytes:
    """A block, header and payload, without the rest of its slot."""
    row = block.cpu().numpy()
    return row[: length(row)].tobytes()


def same_block(read: Tensor, made: Tensor) -> bool:
    """Whether two slots hold the same block. A tier need not keep what follows the block in its slot."""
    own = length(made.cpu().numpy())
    return torch.equal(read[:own].cpu(), made[:own].cpu())
