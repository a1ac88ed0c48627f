"""`refit`: trains a bank's codec anew on all that the bank holds, and encodes every memory by it."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.bank import records
from m3runtime.bank.bank import Bank
from m3runtime.bank.codecs import slot_bytes
from m3runtime.bank.manifest import Manifest, OtherCodec, PlannedCodec
from m3runtime.codecs import Codec
from m3runtime.codecs.raw import RawCodec
from m3runtime.codecs.steps import Steps
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Reference
from m3runtime.errors import BlockError
from m3runtime.memory import block
from m3runtime.memory.block import Ids, as_ids
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.retrieval.embedder import Embeddings
from m3runtime.storage.home import Batch, Changes
from m3runtime.writing import codec_files
from m3runtime.writing.codec_training import TRAINING, encoded, encoded_ids, known_ids, starter, train, training_key
from m3runtime.writing.erasure import finish_begun
from m3runtime.writing.fitting import memory_tokens, sample
from m3runtime.writing.writer import OnProgress

log = logging.getLogger("m3runtime")

_PENDING = "codec_refit"
"""Its value is the fingerprint of the codec by which memories are being encoded anew; empty after that."""


@dataclass(frozen=True, slots=True)
class RefitReport:
    """The result of `refit`."""

    codec: str
    """The kind of the codec that new blocks have from now on."""
    fingerprint: str
    planned: bool
    """True if there is too little to train the configured codec on: the bank is in int8 until there is enough."""
    encoded: Mapping[int, int] = field(default_factory=dict)
    """Maps the old id of each memory that was encoded anew to its new one."""
    left: int = 0
    """Memories with blocks of other codecs: the new one would lose too much of them, or their records are damaged."""


@dataclass(frozen=True, slots=True)
class _Target:
    """The codecs to encode by, and the manifest of a bank that has them."""

    codecs: tuple[Codec, ...]
    manifest: Manifest


def refit(config: Config, progress: OnProgress | None = None) -> RefitReport:
    """Give the configured bank the configured codec: trained anew, of ``codec.file``, or one that learns nothing.

    Memories get new ids, as in a repair. Those in int8 or raw are encoded from what is stored, the others are computed
    by the model. A call can be stopped at any instant and repeated: it goes on, and until then every block is read by
    the codec that it was encoded by. With fewer memory tokens than ``codec.sample_tokens`` nothing is trained, and the
    bank gets int8 until there are as many.

    Raises `BankBusyError`, `BankMismatchError` if the configured model is not the bank's, `ConfigError`, and
    `BankFullError`.
    """
    with closing(assembly.open_bank(config)) as bank, closing(assembly.open_adapter(config)) as adapter:
        adapter.check(bank.manifest, bank.path)
        work = _Refit(config, bank, adapter, progress)
        if (bank.home.get_meta(_PENDING) or b"").decode() != bank.manifest.codec:
            target = work.target()
            work.make_room(target)
            bank.home.set_meta(_PENDING, target.manifest.codec.encode())
            bank.adopt(target.manifest, *target.codecs)
            Steps(bank.path / TRAINING).remove()
        report = work.encode()
        assembly.bank_index(config, bank).update()
        finish_begun(config, bank)
        return report


@dataclass(slots=True)
class _Stored:
    """A memory of the bank whose block and reference are sound."""

    id: int
    codec: bytes
    """The codec of its block, as the header has it."""
    reference: Reference
    memory: MemoryTensors | None
    """The memory alone; None until the model has computed it."""


class _Refit:
    """The refitting of one bank."""

    def __init__(self, config: Config, bank: Bank, adapter: Adapter, progress: OnProgress | None) -> None:
        self.config, self.bank, self.adapter = config, bank, adapter
        self._progress = progress or (lambda *_: None)
        self._starter = starter(adapter.spec)
        self._size = config.memory.batch_size

    def target(self) -> _Target:
        """The codec to encode by, trained on what the bank holds if it learns, and the manifest of a bank with it."""
        spec, manifest = self.adapter.spec, self.bank.manifest
        codec = codec_files.configured(self.config, spec)
        if codec.trained:
            new = manifest.with_codec(codec.kind, codec.options, codec.fingerprint)
            return _Target((codec,), replace(new, planned=None, typical_errors=()))
        chosen = sample(encoded(self.bank), self.config.codec.sample_tokens, spec)
        if memory_tokens(chosen, spec) >= self.config.codec.sample_tokens:
            ids = known_ids(self.bank, chosen)
            stored = (one for some in self._batches(ids) for one in self._read(some))
            memories = (one.memory for one in stored if one.memory is not None)
            steps = Steps(self.bank.path / TRAINING, training_key(self.bank, codec, chosen))
            progress = partial(self._progress, "Training the codec")
            found = train(codec, self.adapter, chosen, memories, len(ids), self._size, steps, progress)
            if found.is_good:
                new = manifest.with_codec(codec.kind, codec.options, codec.fingerprint)
                first = OtherCodec(self._starter.kind, dict(self._starter.options), self._starter.fingerprint)
                others = (first, *(one for one in new.others if one.fingerprint != first.fingerprint))
                typical = found.limit.typical
                return _Target(
                    (codec, self._starter), replace(new, others=others, planned=None, typical_errors=typical)
                )
        planned = PlannedCodec(codec.kind, dict(codec.options))
        new = manifest.with_codec(self._starter.kind, self._starter.options, self._starter.fingerprint)
        return _Target((self._starter,), replace(new, planned=planned, typical_errors=()))

    def make_room(self, target: _Target) -> None:
        """Widen the slots of the home where a codec of the target needs it."""
        needed = max(map(slot_bytes, target.codecs))
        if needed > self.bank.home.slot_bytes:
            self.bank.home.widen(needed)

    def encode(self) -> RefitReport:
        """Encode every memory that the newest codec has not encoded, then drop the codecs that no block needs."""
        manifest, ids = self.bank.manifest, encoded_ids(self.bank)
        new: dict[int, int] = {}
        left = Counter[bytes]()
        done = 0
        for some in self._batches(ids):
            self._progress("Encoding memories", done, len(ids))
            done += len(some)
            others = self._read(some, but=manifest.stamp.codec_bytes)
            new |= self._replace(others)
            left.update(one.codec for one in others if one.id not in new)
        self._progress("Encoding memories", done, len(ids))
        fallback = manifest.others[:1] if manifest.typical_errors else ()
        needed = [one for one in manifest.others if one in fallback or bytes.fromhex(one.fingerprint)[:8] in left]
        self.bank.adopt(replace(manifest, others=tuple(needed)))
        self.bank.home.set_meta(_PENDING, b"")
        return RefitReport(manifest.codec_kind, manifest.codec, bool(manifest.planned), new, left.total())

    def _replace(self, memories: Sequence[_Stored]) -> dict[int, int]:
        """Encode these under new ids, and forget the old ones in the same transaction. Maps old ids to new ones.

        A memory that would have a block of the same codec again stays as it is.
        """
        home = self.bank.home
        vectors: dict[int, Embeddings] = {}
        ids = as_ids([one.id for one in memories])
        for some, rows in records.embeddings(home, ids, self.bank.manifest.dim, {}):
            vectors.update(zip(some.tolist(), rows, strict=True))
        taken: list[_Stored] = []
        blocks: list[Tensor] = []
        first = home.next_id()
        for one in memories:
            if one.id in vectors and one.memory is not None:
                made = self.bank.blocks(as_ids([first + len(taken)]), one.memory)
                if _codec_of(made) != one.codec:
                    taken.append(one)
                    blocks.append(made)
        if not taken:
            return {}
        new = as_ids(range(first, first + len(taken)))
        embeddings = np.stack([vectors[one.id] for one in taken])
        batch = Batch(new, torch.cat(blocks), [one.reference for one in taken], embeddings)
        states = home.states()
        kept = {name: states[name] for one in taken for name in one.reference.sources if name in states}
        home.commit(batch, replacing=as_ids([one.id for one in taken]), changes=Changes(states=kept))
        return dict(zip([one.id for one in taken], new.tolist(), strict=True))

    def _read(self, ids: Ids, but: bytes = b"") -> list[_Stored]:
        """The memories of ids, without those whose blocks are of the codec ``but``."""
        found, _ = records.references(self.bank.home, ids)
        slot = torch.zeros(1, self.bank.home.slot_bytes, dtype=torch.uint8)
        stored = []
        for row, reference in enumerate(found):
            if reference is None or not self.bank.home.read(ids[row : row + 1], slot)[0]:
                continue
            try:
                block.check(slot[0].numpy(), id=int(ids[row]), stamp=self.bank.codecs)
                if (codec := _codec_of(slot)) != but:
                    exact = self._is_exact(self.bank.codecs.of(block.headers(slot.numpy())[0]))
                    memory = self.bank.decode(slot, torch.float32) if exact else None
                    stored.append(_Stored(int(ids[row]), codec, reference, memory))
            except BlockError as error:
                log.warning("not encoded anew: %s; run `m3 verify --repair`", error)
        lacking = [one for one in stored if one.memory is None]
        if lacking:
            memories = self.adapter.encode([one.reference.text for one in lacking])
            for row, one in enumerate(lacking):
                one.memory = memories.rows(slice(row, row + 1))
        return stored

    def _is_exact(self, codec: Codec) -> bool:
        """Does a codec lose so little that its blocks need not be computed again?"""
        return isinstance(codec, RawCodec) or codec.fingerprint == self._starter.fingerprint

    def _batches(self, ids: Ids) -> Iterator[Ids]:
        return (ids[start : start + self._size] for start in range(0, len(ids), self._size))


def _codec_of(blocks: Tensor) -> bytes:
    """The codec of the first block, as its header has it."""
    return bytes(block.headers(blocks.numpy())[0]["codec"])
