"""`Writer`: turns documents into references and memories, and commits them to a bank."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from m3runtime import assembly, codec_files
from m3runtime.adapter import Adapter
from m3runtime.bank import Bank, Manifest
from m3runtime.block import HEADER_BYTES
from m3runtime.codecs import Codec
from m3runtime.config import Config
from m3runtime.encoding import GROUP, Group, batches
from m3runtime.fitting import fit_codec, sample_size
from m3runtime.references import references_of
from m3runtime.retrieval import Embedder
from m3runtime.sampling import reservoir
from m3runtime.side_stream import SideStream
from m3runtime.splitting import Splitter
from m3runtime.text import Document
from m3runtime.tier import Reference
from m3runtime.worker import Job, Worker

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BATCHES_AHEAD = 2
"""Batches of memories that wait for their encoding, at most: on an accelerator they take its memory."""

STAGES = ("split", "codec", "model", "encode", "embed", "commit", "index")
"""What writing consists of: of documents references, a codec that is trained or loaded, and so on."""

OnProgress = Callable[[str, int, int], None]
"""Called with the stage (``codec`` or ``memories``), the steps done, and all of them."""


@dataclass(frozen=True, slots=True)
class WriteReport:
    """What a call of `Writer.write` did."""

    documents: int
    references: int
    """References that the documents were split into, equal ones counted once."""
    written: int
    known: int
    """References that the bank remembered already."""
    bytes: int
    """Bytes of the blocks that were written."""
    seconds: float
    stages: Mapping[str, float] = field(default_factory=dict)
    """Seconds that went by in each of `STAGES`. They may overlap, and an accelerator's work is waited for where its
    result is copied."""


class Writer:
    """Writes into one bank with one model and one embedder. One call at a time.

    The model runs in the caller's thread. While it computes a group, the one before is committed by another thread;
    with ``beside``, a third one encodes and embeds meanwhile what the model computed. The default is that wherever the
    model is not on a CPU. There, encoding would only take from the model what it adds: it has all the cores in turn.
    """

    def __init__(self, config: Config, adapter: Adapter, embedder: Embedder, *, beside: bool | None = None) -> None:
        self.config = config
        self.adapter = adapter
        self.embedder = embedder
        self.beside = adapter.device.type != "cpu" if beside is None else beside
        self.splitter = Splitter(adapter.count_tokens, max_tokens=adapter.spec.reference_tokens)

    def write(
        self, documents: Iterable[Document], *, whole: bool = False, progress: OnProgress | None = None
    ) -> WriteReport:
        """Remember what is in these documents and not yet in the bank, which is made if it is not there.

        With ``whole`` every document is one reference. It can be stopped at any instant and called again: each
        transaction is whole, and what is remembered is passed over. Raises `InputError` before anything is written,
        `BankMismatchError` if the bank is another model's, `BankFullError`.
        """
        began, clock = time.perf_counter(), _Clock()
        with clock.stage("split"):
            count, references = self._references(documents, whole=whole)
        assembly.make_index(self.config, self.embedder.dim)  # a mistake there should not show only at the end
        with clock.stage("codec"):
            bank = self._open(references, progress)
        try:
            found = bank.home.find([reference.text for reference in references])
            pending = [one for one, id in zip(references, found, strict=True) if id is None]
            known = len(references) - len(pending)

            def computed(count: int) -> None:
                if progress:
                    progress("memories", known + count, len(references))

            self._commit(bank, pending, computed, clock)
            with clock.stage("index"):
                index, changed = assembly.open_index(self.config, bank)
                if changed:
                    assembly.save_index(index, bank)
        finally:
            bank.close()
        size = self._bytes(bank, pending)
        seconds = time.perf_counter() - began
        return WriteReport(count, len(references), len(pending), known, size, seconds, clock.seconds)

    def _references(self, documents: Iterable[Document], *, whole: bool) -> tuple[int, list[Reference]]:
        """How many documents there are, and `references_of` them."""
        count = 0

        def counted() -> Iterator[Document]:
            nonlocal count
            for document in documents:
                count += 1
                yield document

        references = list(references_of(counted(), self.splitter, whole=whole))
        return count, references

    def _open(self, references: Sequence[Reference], progress: OnProgress | None) -> Bank:
        """The bank after its manifest was found to fit, or a new one with its codec."""
        adapter, open_home = self.adapter, assembly.open_home(self.config)
        if Bank.exists(self.config.bank, open_home):
            bank = assembly.open_bank(self.config)
            try:
                adapter.check(bank.manifest, bank.path)
                codec_files.check_bank(self.config, bank)
                bank.manifest.check_embedder(
                    embedder=self.embedder.fingerprint, name=self.config.embedder.path, where=bank.path
                )
            except BaseException:
                bank.close()
                raise
            return bank
        codec = self._train(references, progress)
        manifest = Manifest(
            model=adapter.model_fingerprint,
            model_name=adapter.name,
            tokenizer=adapter.tokenizer_fingerprint,
            sink=adapter.sink,
            spec=adapter.spec,
            codec_kind=self.config.codec.kind,
            codec_options=dict(codec.options),
            codec=codec.fingerprint,
            embedder=self.embedder.fingerprint,
            embedder_name=self.config.embedder.path,
            dim=self.embedder.dim,
        )
        return Bank.create(self.config.bank, open_home, manifest, codec)

    def _train(self, references: Sequence[Reference], progress: OnProgress | None) -> Codec:
        """The configured codec: that of ``codec.file``, or trained if it learns on a sample of these references."""
        codec = codec_files.configured(self.config, self.adapter.spec)
        if codec.trained:
            return codec
        texts = [reference.text for reference in reservoir(references, sample_size(self.adapter.spec))]
        fit_codec(codec, self.adapter, texts, self.config.memory.batch_size, progress and partial(progress, "codec"))
        return codec

    def _commit(
        self, bank: Bank, references: Sequence[Reference], computed: Callable[[int], None], clock: "_Clock"
    ) -> None:
        """Encode and commit references, each `GROUP` of them in one transaction, in order.

        ``computed`` is called with how many of them the model has read.
        """
        adapter, embedder, stream = self.adapter, self.embedder, SideStream(self.adapter.device)
        first_id, count = bank.home.next_id(), 0

        def give(stage: str, work: Job, tensors: "Sequence[Tensor]" = ()) -> None:
            encode(partial(arrived, stage, work, tensors, stream.mark()))

        def arrived(stage: str, work: Job, tensors: "Sequence[Tensor]", ready: "torch.Event | None") -> None:
            with clock.stage(stage), stream.use():
                stream.arrive(ready, tensors)
                work()

        def commit(group: Group) -> None:
            with clock.stage("commit"):
                bank.home.commit(group.batch())

        with ExitStack() as workers:
            commits = workers.enter_context(Worker(ahead=1))
            encode: Callable[[Job], object] = _now
            if self.beside:
                encode = workers.enter_context(Worker(ahead=_BATCHES_AHEAD)).do
            for start in range(0, len(references), GROUP):
                computed(start)
                group = Group(bank, first_id + start, references[start : start + GROUP])
                give("embed", partial(group.embed, embedder))
                for rows in batches(group.references, self.config.memory.batch_size):
                    with clock.stage("model"):
                        memories = adapter.encode(group.texts(rows))
                    give("encode", partial(group.put, rows, memories), (memories.keys, memories.values))
                    del memories  # the worker's now, or gone: the model needs the room
                    computed(count := count + len(rows))
                encode(partial(commits.do, partial(commit, group)))

    def _bytes(self, bank: Bank, references: Sequence[Reference]) -> int:
        """Bytes of the blocks of these references."""
        kept = [min(reference.tokens, self.adapter.spec.tokens) for reference in references]
        return sum(bank.codec.payload_bytes(tokens) + HEADER_BYTES for tokens in kept)


def _now(job: Job) -> None:
    job()


class _Clock:
    """Seconds by stage, each the work of one thread at a time."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The block is more of this stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - began
