"""`refit`: trains a bank's codec anew on all that the bank holds, and encodes every memory by it."""

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.bank.bank import Bank
from m3runtime.bank.codecs import slot_bytes
from m3runtime.bank.manifest import Manifest, OtherCodec, PlannedCodec
from m3runtime.codecs import Codec
from m3runtime.codecs.steps import Steps
from m3runtime.config.schema import Config
from m3runtime.writing import codec_files, reencoding
from m3runtime.writing.codec_training import encoded, known_ids, train, training_key
from m3runtime.writing.encoding import read_texts
from m3runtime.writing.erasure import finish_begun
from m3runtime.writing.fitting import TRAINING, memory_tokens, sample
from m3runtime.writing.reencoding import starter, stored_memories
from m3runtime.writing.writer import OnProgress


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
        if not reencoding.is_begun(bank):
            target = work.target()
            work.make_room(target)
            reencoding.begin(bank, target.manifest, *target.codecs)
        Steps(bank.path / TRAINING).remove()
        done = reencoding.reencode(
            bank, config.memory.batch_size, adapter, progress and partial(progress, "Encoding memories anew")
        )
        assembly.update_indexes(config, bank)
        finish_begun(config, bank)
        manifest = bank.manifest
        return RefitReport(manifest.codec_kind, manifest.codec, bool(manifest.planned), done.ids, done.left)


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
            memories = stored_memories(self.bank, ids, self._size, self.adapter)
            steps = Steps(self.bank.path / TRAINING, training_key(self.bank, codec, chosen))
            progress = partial(self._progress, "Training the codec")
            texts = read_texts(self.bank.manifest, self.adapter, chosen)
            found = train(codec, self.adapter, texts, memories, len(ids), self._size, steps, progress)
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
