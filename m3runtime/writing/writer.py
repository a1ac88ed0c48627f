"""`Writer`: turns documents into references and memories, and commits them to a bank."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.bank.bank import Bank
from m3runtime.bank.manifest import Manifest
from m3runtime.codecs import Codec
from m3runtime.config.schema import Config
from m3runtime.device.side_stream import SideStream
from m3runtime.documents.reading import Document
from m3runtime.documents.reference import Reference
from m3runtime.documents.references import references_of
from m3runtime.documents.splitting import Splitter
from m3runtime.memory.block import HEADER_BYTES, Ids, as_ids
from m3runtime.retrieval.embedder import Embedder
from m3runtime.writing import codec_files
from m3runtime.writing.encoding import GROUP, Group, batches
from m3runtime.writing.fitting import fit_codec, sample_size
from m3runtime.writing.sampling import reservoir
from m3runtime.writing.worker import Job, Worker

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_BATCHES_AHEAD = 2
"""Batches of memories that wait for their encoding, at most: on an accelerator they take its memory."""

STAGES = ("split", "codec", "model", "encode", "embed", "commit", "index")
"""What writing consists of: of documents references, a codec that is trained or loaded, and so on."""

_Store = Callable[[Group], None]
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
    """References that the bank remembered already, and that were not written now."""
    bytes: int
    """Bytes of the blocks that were written."""
    seconds: float
    stages: Mapping[str, float] = field(default_factory=dict)
    """Seconds that went by in each of `STAGES`. They may overlap, and an accelerator's work is waited for where its
    result is copied."""
    catalogued: int = 0
    """References that were added without being encoded."""


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
        self,
        documents: Iterable[Document],
        *,
        whole: bool = False,
        catalogue: bool = False,
        progress: OnProgress | None = None,
    ) -> WriteReport:
        """Remember what is in these documents and not yet in the bank, which is made if it is not there.

        With ``whole`` every document is one reference. With ``catalogue`` the model does not read them: they are cold
        until they are recalled (``recall.cold_start``) or written without it. It can be stopped at any instant and
        called again: each transaction is whole, and what is remembered is passed over. Raises `InputError` before
        anything is written, `BankMismatchError` if the bank is another model's, `BankFullError`.
        """
        began, clock = time.perf_counter(), _Clock()
        with clock.stage("split"):
            count, references = self._references(documents, whole=whole)
        assembly.make_index(self.config, self.embedder.dim)  # a mistake there should not show only at the end
        with clock.stage("codec"):
            bank = self._open(references, progress)
        try:
            found = bank.home.find([reference.text for reference in references])
            new = [one for one, id in zip(references, found, strict=True) if id is None]
            cold = {} if catalogue else _cold(bank, references, found)
            known = len(references) - len(new) - len(cold)

            def computed(count: int) -> None:
                if progress:
                    progress("memories", known + count, len(references))

            self._commit(bank, cold, new, computed, clock, read=not catalogue)
            with clock.stage("index"):
                assembly.bank_index(self.config, bank).update()
        finally:
            bank.close()
        seconds = time.perf_counter() - began
        if catalogue:
            return WriteReport(count, len(references), 0, known, 0, seconds, clock.seconds, len(new))
        size = self._bytes(bank, [*cold.values(), *new])
        return WriteReport(count, len(references), len(new) + len(cold), known, size, seconds, clock.seconds)

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
        self,
        bank: Bank,
        cold: Mapping[int, Reference],
        new: Sequence[Reference],
        computed: Callable[[int], None],
        clock: "_Clock",
        *,
        read: bool,
    ) -> None:
        """Encode and commit references, those that are ``cold`` first, each `GROUP` of them in one transaction.

        ``computed`` is called with how many of them the model has read. Without ``read`` it reads none, and the new
        ones are catalogued.
        """
        adapter, embedder, stream = self.adapter, self.embedder, SideStream(self.adapter.device)
        first_id, count = bank.home.next_id(), 0
        new_ids = as_ids(range(first_id, first_id + len(new)))
        add = Group.commit if read else Group.catalogue

        def give(stage: str, work: Job, tensors: "Sequence[Tensor]" = ()) -> None:
            encode(partial(arrived, stage, work, tensors, stream.mark()))

        def arrived(stage: str, work: Job, tensors: "Sequence[Tensor]", ready: "torch.Event | None") -> None:
            with clock.stage(stage), stream.use():
                stream.arrive(ready, tensors)
                work()

        def commit(store: _Store, group: Group) -> None:
            with clock.stage("commit"):
                store(group)

        with ExitStack() as workers:
            commits = workers.enter_context(Worker(ahead=1))
            encode: Callable[[Job], object] = _now
            if self.beside:
                encode = workers.enter_context(Worker(ahead=_BATCHES_AHEAD)).do
            old = _groups(bank, as_ids(list(cold)), list(cold.values()), Group.fill)
            for store, group in chain(old, _groups(bank, new_ids, new, add)):
                computed(count)
                if store is not Group.fill:
                    give("embed", partial(group.embed, embedder))
                for rows in batches(group.references, self.config.memory.batch_size) if read else ():
                    with clock.stage("model"):
                        memories = adapter.encode(group.texts(rows))
                    give("encode", partial(group.put, rows, memories), (memories.keys, memories.values))
                    del memories  # the worker's now, or gone: the model needs the room
                    computed(count := count + len(rows))
                encode(partial(commits.do, partial(commit, store, group)))
                if not read:
                    computed(count := count + len(group.references))

    def _bytes(self, bank: Bank, references: Sequence[Reference]) -> int:
        """Bytes of the blocks of these references."""
        kept = [min(reference.tokens, self.adapter.spec.tokens) for reference in references]
        return sum(bank.codec.payload_bytes(tokens) + HEADER_BYTES for tokens in kept)


def _cold(bank: Bank, references: Sequence[Reference], found: Sequence[int | None]) -> dict[int, Reference]:
    """Those that were found and are cold, by id."""
    known = {id: one for one, id in zip(references, found, strict=True) if id is not None}
    return {id: known[id] for id in bank.home.cold(as_ids(list(known))).tolist()}


def _groups(bank: Bank, ids: Ids, references: Sequence[Reference], store: _Store) -> Iterator[tuple[_Store, Group]]:
    """Groups of references, and how each is stored."""
    for start in range(0, len(ids), GROUP):
        yield store, Group(bank, ids[start : start + GROUP], references[start : start + GROUP])


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
