"""Re-encoding: a bank's memories get blocks of its newest codec, from what is stored, a batch in each transaction.

A block never changes, so a memory that is encoded anew gets a new id; its text, places and embedding stay.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from m3runtime.adapters.base import Adapter
from m3runtime.bank import records
from m3runtime.bank.bank import Bank
from m3runtime.bank.manifest import Manifest
from m3runtime.codecs import Codec
from m3runtime.codecs.raw import RawCodec
from m3runtime.codecs.scalar import ScalarCodec
from m3runtime.codecs.steps import Steps
from m3runtime.documents.reference import Reference
from m3runtime.errors import BankFullError, BlockError
from m3runtime.memory import block
from m3runtime.memory.block import Ids, as_ids
from m3runtime.memory.spec import MemorySpec
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.retrieval.embedder import Embeddings
from m3runtime.storage.home import Batch, Changes
from m3runtime.writing.encoding import read_texts
from m3runtime.writing.fitting import TRAINING, OnStep

log = logging.getLogger("m3runtime")

_PENDING = "codec_refit"
"""Its value is the fingerprint of the codec by which memories are being encoded anew; empty after that."""


@dataclass(frozen=True, slots=True)
class Reencoded:
    """The result of `reencode`."""

    ids: Mapping[int, int] = field(default_factory=dict)
    """Maps the old id of each memory that was encoded anew to its new one."""
    left: int = 0
    """Memories with blocks of other codecs: the newest would lose too much of them, or they cannot be read."""
    saved: int = 0
    """Bytes that the old blocks had more than the new ones."""


@dataclass(slots=True)
class Stored:
    """A memory of the bank whose block and reference are sound."""

    id: int
    codec: bytes
    """The codec of its block, as the header has it."""
    bytes: int
    """The length of its block."""
    reference: Reference
    memory: MemoryTensors | None
    """The memory alone; None if its codec loses too much of it, and no model computed it."""


def starter(spec: MemorySpec) -> Codec:
    """The codec of banks that are too small to train one: int8, which loses next to nothing of any memory."""
    return ScalarCodec(spec, bits=8)


def begin(bank: Bank, manifest: Manifest, *codecs: Codec) -> None:
    """Give the bank a manifest with another newest codec. Until `reencode` has ended, `is_begun`."""
    bank.home.set_meta(_PENDING, manifest.codec.encode())
    bank.adopt(manifest, *codecs)


def is_begun(bank: Bank) -> bool:
    """Has a re-encoding by the newest codec begun that has not ended?"""
    return (bank.home.get_meta(_PENDING) or b"").decode() == bank.manifest.codec


def reencode(bank: Bank, batch_size: int, adapter: Adapter | None = None, on_step: OnStep | None = None) -> Reencoded:
    """Encode every memory by the newest codec that has a block of another, and drop codecs that no block needs.

    Memories in int8 or raw are encoded from what is stored, the others are computed by the model; without ``adapter``
    they are left, and the re-encoding has not ended. ``batch_size`` memories are replaced in one transaction. It can be
    stopped at any instant and repeated. At the end old blocks leave the home's file, if the drive has room for that.
    """
    Steps(bank.path / TRAINING).remove()  # the codec is in a file of its own
    manifest, ids = bank.manifest, encoded_ids(bank)
    new: dict[int, int] = {}
    left = Counter[bytes]()
    saved, ends = 0, True
    for start in range(0, len(ids), batch_size):
        if on_step:
            on_step(start, len(ids))
        others = _read(bank, ids[start : start + batch_size], adapter, but=manifest.stamp.codec_bytes)
        replaced, fewer = _replace(bank, others)
        new |= replaced
        saved += fewer
        left.update(one.codec for one in others if one.id not in new)
        ends = ends and all(one.memory is not None for one in others)
    if on_step:
        on_step(len(ids), len(ids))
    if ends:
        fallback = manifest.others[:1] if manifest.typical_errors else ()
        needed = [one for one in manifest.others if one in fallback or bytes.fromhex(one.fingerprint)[:8] in left]
        bank.adopt(replace(manifest, others=tuple(needed)))
        try:
            bank.home.compact()
        except BankFullError as error:
            log.warning("the room of former blocks is not given back to the drive: %s", error)
        bank.home.set_meta(_PENDING, b"")
    return Reencoded(new, left.total(), saved)


def encoded_ids(bank: Bank) -> Ids:
    """The ids of memories that have a block which is not quarantined."""
    return np.setdiff1d(bank.home.ids(), bank.home.cold())


def stored_memories(bank: Bank, ids: Ids, batch_size: int, adapter: Adapter | None = None) -> Iterator[MemoryTensors]:
    """The memories of ids one by one, in float32. Those without a sound block are left out.

    Without ``adapter``, those are too of which the codec of their block loses too much.
    """
    for start in range(0, len(ids), batch_size):
        for one in _read(bank, ids[start : start + batch_size], adapter):
            if one.memory is not None:
                yield one.memory


def _read(bank: Bank, ids: Ids, adapter: Adapter | None, but: bytes = b"") -> list[Stored]:
    """The memories of ids, without those whose blocks are of the codec ``but``."""
    found, _ = records.references(bank.home, ids)
    slot = torch.zeros(1, bank.home.slot_bytes, dtype=torch.uint8)
    exact = starter(bank.manifest.spec).fingerprint
    stored = []
    for row, reference in enumerate(found):
        if reference is None or not bank.home.read(ids[row : row + 1], slot)[0]:
            continue
        try:
            block.check(slot[0].numpy(), id=int(ids[row]), stamp=bank.codecs)
            if (name := _codec_of(slot)) != but:
                codec = bank.codecs.of(block.headers(slot.numpy())[0])
                is_exact = isinstance(codec, RawCodec) or codec.fingerprint == exact
                memory = bank.decode(slot, torch.float32) if is_exact else None
                stored.append(Stored(int(ids[row]), name, block.length(slot[0].numpy()), reference, memory))
        except BlockError as error:
            log.warning("not encoded anew: %s; run `m3 verify --repair`", error)
    lacking = [one for one in stored if one.memory is None]
    if lacking and adapter is not None:
        memories = adapter.encode(read_texts(bank.manifest, adapter, [one.reference for one in lacking]))
        for row, one in enumerate(lacking):
            one.memory = memories.rows(slice(row, row + 1))
    return stored


def _replace(bank: Bank, memories: Sequence[Stored]) -> tuple[dict[int, int], int]:
    """Encode these under new ids, and forget the old ones in the same transaction.

    Returns a map of old ids to new ones, and the bytes that the old blocks had more. A memory that would have a block
    of the same codec again stays as it is.
    """
    home = bank.home
    vectors: dict[int, Embeddings] = {}
    ids = as_ids([one.id for one in memories])
    for some, rows in records.embeddings(home, ids, bank.manifest.dim, {}):
        vectors.update(zip(some.tolist(), rows, strict=True))
    taken: list[Stored] = []
    blocks: list[Tensor] = []
    there = [one for one in memories if one.id in vectors and one.memory is not None]
    first = home.reserve(len(there)) if there else 0
    for one in there:
        if one.memory is not None:
            made = bank.blocks(as_ids([first + len(taken)]), one.memory)
            if _codec_of(made) != one.codec:
                taken.append(one)
                blocks.append(made)
    if not taken:
        return {}, 0
    new = as_ids(range(first, first + len(taken)))
    embeddings = np.stack([vectors[one.id] for one in taken])
    batch = Batch(new, torch.cat(blocks), [one.reference for one in taken], embeddings)
    states = home.states()
    kept = {name: states[name] for one in taken for name in one.reference.sources if name in states}
    home.commit(batch, replacing=as_ids([one.id for one in taken]), changes=Changes(states=kept))
    saved = sum(one.bytes - block.length(made[0].numpy()) for one, made in zip(taken, blocks, strict=True))
    return dict(zip([one.id for one in taken], new.tolist(), strict=True)), saved


def _codec_of(blocks: Tensor) -> bytes:
    """The codec of the first block, as its header has it."""
    return bytes(block.headers(blocks.numpy())[0]["codec"])
