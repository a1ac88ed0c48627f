"""The codec of a bank from its first reference on: int8, until there is enough to train the configured one on.

A bank whose codec learns begins with `starter`, and its manifest has the *planned* codec. The first `Writer.write` that
finds enough memory tokens, in the bank and in what it is to write, stores a uniform sample of both first, and trains
the planned codec on it. A measurement decides whether new blocks get the trained codec; each of them is measured again
(see `m3runtime.codecs.limit`). Then blocks that were written before are encoded anew: see `reencoding`.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.bank import records
from m3runtime.bank.bank import Bank
from m3runtime.bank.codecs import slot_bytes
from m3runtime.bank.manifest import PlannedCodec
from m3runtime.codecs import Codec
from m3runtime.codecs.limit import MOST, ErrorLimit, held_out, relative_errors
from m3runtime.codecs.steps import Steps
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Reference
from m3runtime.memory.block import Ids, as_ids
from m3runtime.memory.spec import MemorySpec, fingerprint
from m3runtime.memory.tensors import MemoryTensors
from m3runtime.writing import codec_files, reencoding
from m3runtime.writing.encoding import GROUP, Group, Store, read_texts
from m3runtime.writing.fitting import TRAINING, OnStep, collected, memory_tokens, sample, weigh
from m3runtime.writing.pipeline import Pipeline
from m3runtime.writing.reencoding import encoded_ids, starter, stored_memories

log = logging.getLogger("m3runtime")

_TRIED = "codec_tried"
_AGAIN = 2
"""How many times the tokens of a training that failed there must be before the next."""
_MANY = 1 / 8
"""The share of held-out memories above the limit from which a trained codec is not used."""
_BATCH = 1024

OnProgress = Callable[[str, int, int], None]
"""Called with the title of a task, its steps done, and all its steps."""


@dataclass(frozen=True, slots=True)
class Beginning:
    """The codec that a new bank begins with, and the one that it is to have."""

    codec: Codec
    planned: PlannedCodec | None
    slot_bytes: int
    """Bytes of a slot for both."""


@dataclass(frozen=True, slots=True)
class Early:
    """What `train_if_due` did."""

    stored: int = 0
    """References that it stored."""
    trained: bool = False
    """Has the bank got its planned codec?"""


@dataclass(frozen=True, slots=True)
class Judged:
    """A trained codec and what it loses."""

    codec: Codec
    limit: ErrorLimit
    worse: float
    """The share of held-out memories that lose more than the limit allows."""

    @property
    def is_good(self) -> bool:
        """May it encode memories that it was not trained on?"""
        return self.worse <= _MANY


def beginning(config: Config, spec: MemorySpec) -> Beginning:
    """The beginning of a new bank: with ``codec.file`` and codecs that learn nothing, the configured codec itself.

    Raises `ConfigError`, and `PluginError` if what training will need is missing.
    """
    codec = codec_files.configured(config, spec)
    if codec.trained:
        return Beginning(codec, None, slot_bytes(codec))
    codec.check_fit()
    first = starter(spec)
    planned = PlannedCodec(config.codec.kind, dict(codec.options))
    return Beginning(first, planned, max(slot_bytes(first), slot_bytes(codec)))


def due(config: Config, bank: Bank, references: Iterable[Reference]) -> list[Reference]:
    """The sample to train the planned codec on, of the bank and of references to write; empty if it is too early."""
    if bank.manifest.planned is None:
        return []
    spec, total = bank.manifest.spec, 0

    def counted() -> Iterator[Reference]:
        nonlocal total
        for one in _encoded_and_new(bank, references):
            total += memory_tokens([one], spec)
            yield one

    chosen = sample(counted(), config.codec.sample_tokens, spec)
    tried = json.loads(bank.home.get_meta(_TRIED) or b"0")
    return chosen if total >= max(config.codec.sample_tokens, _AGAIN * tried) else []


def train_if_due(
    config: Config,
    bank: Bank,
    adapter: Adapter,
    references: Iterable[Reference],
    pipeline: Pipeline,
    progress: OnProgress | None = None,
) -> "Early":
    """Store a sample of references to write, and train the planned codec on it and on the bank, if it is not too early.

    The sources of the references have no state then: see `m3runtime.storage.home.Home`.
    """
    chosen = due(config, bank, references)
    if not chosen:
        return Early()
    assembly.make_codec(config, bank.manifest.spec).check_fit()
    stored = 0

    def computed(count: int) -> None:
        nonlocal stored
        stored = count
        if progress:
            progress("Writing memories to train a codec on", count, len(chosen))

    pipeline.run(_unencoded(bank, chosen), computed)
    on_step = progress and partial(progress, "Training the codec")
    with pipeline.clock.phase("codec"):
        return Early(stored, train_planned(config, bank, adapter, chosen, on_step))


def train_planned(
    config: Config, bank: Bank, adapter: Adapter, chosen: Sequence[Reference], progress: OnStep | None = None
) -> bool:
    """Train the planned codec on stored memories, and let it encode new blocks if it proves good. Returns True then.

    Interrupted and called again with the same references, it goes on.
    """
    codec = assembly.make_codec(config, bank.manifest.spec)
    steps = Steps(bank.path / TRAINING, training_key(bank, codec, chosen))
    ids = known_ids(bank, chosen)
    memories = stored_memories(bank, ids, 1)
    texts = read_texts(bank.manifest, adapter, chosen)
    found = train(codec, adapter, texts, memories, len(ids), config.memory.batch_size, steps, progress)
    if not found.is_good:
        total = memory_tokens(encoded(bank), bank.manifest.spec)
        log.warning(
            "%s stays in int8 until it has twice as many references: of memories that the codec was not trained on, "
            "%.0f %% lost more than %g times as much as the others",
            bank.path,
            100 * found.worse,
            MOST,
        )
        bank.home.set_meta(_TRIED, json.dumps(total).encode())
    else:
        manifest = bank.manifest.with_codec(codec.kind, codec.options, codec.fingerprint)
        reencoding.begin(bank, replace(manifest, planned=None, typical_errors=found.limit.typical), codec)
    steps.remove()
    return found.is_good


def training_key(bank: Bank, codec: Codec, chosen: Sequence[Reference]) -> str:
    """What the steps of a training depend on."""
    manifest = bank.manifest
    of = [manifest.model, manifest.tokenizer, manifest.sink, manifest.spec.to_json(), codec.kind, dict(codec.options)]
    return fingerprint([*of, [one.text.encode("utf-8", "surrogatepass").hex() for one in chosen]])


def train(
    codec: Codec,
    adapter: Adapter,
    texts: Sequence[str],
    memories: Iterable[MemoryTensors],
    count: int,
    batch_size: int,
    steps: Steps,
    progress: OnStep | None,
) -> Judged:
    """Train a codec on ``count`` memories of these texts, and measure it on those that it did not train on.

    Takes the bytes of these memories in float16, a few hundred MB, and what `Adapter.importance` takes before.
    """

    def report(share: float) -> None:
        if progress:
            progress(round(100 * share), 100)

    importance = weigh(codec, adapter, texts, batch_size, steps, lambda share: report(share / 3))
    width = min(codec.spec.tokens, max(map(adapter.count_tokens, texts)))
    sampled = collected(memories, count, codec.spec, width)
    codec.fit(sampled, importance, lambda share: report((1 + 2 * share) / 3), steps)
    cut = len(sampled) - held_out(len(sampled))
    every = max(1, cut // max(1, len(sampled) - cut))
    limit = ErrorLimit.of(_errors(codec, sampled, range(0, cut, every)))
    ratios = limit.ratios(_errors(codec, sampled, range(cut, len(sampled))))
    worse = float((ratios > MOST).double().mean()) if len(ratios) else 1.0
    report(1.0)
    return Judged(codec, limit, worse)


def known_ids(bank: Bank, references: Sequence[Reference]) -> Ids:
    """The ids of those references that the bank remembers."""
    return as_ids([id for id in _find(bank, references) if id is not None])


def encoded(bank: Bank) -> Iterator[Reference]:
    """The readable references of `encoded_ids`."""
    ids = encoded_ids(bank)
    for start in range(0, len(ids), _BATCH):
        found, _ = records.references(bank.home, ids[start : start + _BATCH])
        yield from (one for one in found if one is not None)


def _errors(codec: Codec, memories: MemoryTensors, rows: Iterable[int]) -> torch.Tensor:
    """`relative_errors` of some memories, one at a time."""
    found = [torch.zeros(0, 2 * len(codec.spec.layers), dtype=torch.float64)]
    for row in rows:
        one = memories.rows(slice(row, row + 1))
        found.append(relative_errors(one, codec.decode(codec.encode(one), one.tokens, torch.float32)))
    return torch.cat(found)


def _encoded_and_new(bank: Bank, references: Iterable[Reference]) -> Iterator[Reference]:
    """The references that the bank has blocks of, and those of ``references`` that it has none of."""
    home = bank.home
    yield from encoded(bank)
    some: list[Reference] = []

    def new() -> Iterator[Reference]:
        known = _find(bank, some)
        cold = set(home.cold(as_ids([id for id in known if id is not None])).tolist())
        yield from (one for one, id in zip(some, known, strict=True) if id is None or id in cold)
        some.clear()

    for one in references:
        some.append(one)
        if len(some) == _BATCH:
            yield from new()
    if some:
        yield from new()


def _unencoded(bank: Bank, references: Sequence[Reference]) -> Iterator[tuple[Store, Group]]:
    """Those references that are new or cold, in groups, and the transaction that stores each."""
    ids = _find(bank, references)
    cold = set(bank.home.cold(as_ids([id for id in ids if id is not None])).tolist())
    lacking = [(id, one) for one, id in zip(references, ids, strict=True) if id in cold]
    new = [one for one, id in zip(references, ids, strict=True) if id is None]
    for start in range(0, len(lacking), GROUP):
        some = lacking[start : start + GROUP]
        yield Group.fill, Group(bank, as_ids([id for id, _ in some if id is not None]), [one for _, one in some])
    for start in range(0, len(new), GROUP):
        fresh = new[start : start + GROUP]
        first = bank.home.reserve(len(fresh))
        yield Group.commit, Group(bank, as_ids(range(first, first + len(fresh))), fresh)


def _find(bank: Bank, references: Sequence[Reference]) -> list[int | None]:
    """The id of each reference, or None."""
    return bank.home.find([one.text for one in references], [one.heading for one in references])
