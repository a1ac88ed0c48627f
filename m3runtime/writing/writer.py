"""`Writer`: turns documents into references and memories, and commits them to a bank."""

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.bank.bank import Bank
from m3runtime.bank.manifest import Manifest
from m3runtime.config.schema import Config
from m3runtime.documents.document import Document
from m3runtime.documents.reference import Reference
from m3runtime.documents.sources import SourceState
from m3runtime.documents.splitting import Splitter
from m3runtime.documents.spool import ReferenceSpool
from m3runtime.errors import InputError
from m3runtime.retrieval.embedder import Embedder
from m3runtime.storage.home import Home
from m3runtime.writing import codec_files, codec_training, erasure, reencoding
from m3runtime.writing.encoders.distribution import distribute
from m3runtime.writing.encoders.encoder import Setup
from m3runtime.writing.encoders.pool import EncoderPool
from m3runtime.writing.grouping import Groups
from m3runtime.writing.pipeline import Clock, Pipeline
from m3runtime.writing.reencoding import Reencoded

OnProgress = Callable[[str, int, int], None]
"""Called with the title of a task, its steps done, and all its steps."""


@dataclass(frozen=True, slots=True)
class WriteReport:
    """The result of `Writer.write`."""

    documents: int
    references: int
    """References that the documents were split into, equal ones counted once."""
    written: int
    known: int
    """References that the bank remembered already, and that were not written now."""
    bytes: int
    """Bytes of the blocks that were written, less those that were saved where blocks were encoded anew; 0 at least."""
    seconds: float
    phases: Mapping[str, float] = field(default_factory=dict)
    """Seconds that went by in each of `m3runtime.writing.pipeline.PHASES`. They may overlap, and an accelerator's work
    is waited for where its result is copied. Of several encoders, the seconds of all are added."""
    catalogued: int = 0
    """References that were added without being encoded."""
    forgotten: int = 0
    """References that no source has any more."""
    codec: str | None = None
    """The kind of the codec that was trained, and encodes new blocks from now on."""
    reencoded: int = 0
    """Earlier memories that were encoded anew by the newest codec, under new ids."""
    left: int = 0
    """Earlier memories that this codec would lose too much of, where others were encoded anew."""


class Writer:
    """Writes into one bank with one model and one embedder. One call at a time.

    The model runs in the caller's thread. While it computes a group, the one before is committed by another thread;
    with ``parallel``, a third one encodes the last batches of the model at the same time, and a fourth embeds the
    group. That is the default where the model is not on a CPU. On a CPU, they would take its cores from the model. With
    a pool of encoders, this process reads only the references that a codec is trained on, and commits; but it does all
    itself if there is only one group, which is no work for several.
    """

    def __init__(
        self,
        config: Config,
        adapter: Adapter,
        embedder: Embedder,
        *,
        parallel: bool | None = None,
        pool: EncoderPool | None = None,
        embeds: bool = False,
    ) -> None:
        """With a ``pool`` its encoders read and embed the references; they load their models by the configuration.

        With ``embeds`` they only read them, and this process embeds: ``embedder`` is another one than they have.
        """
        self.config = config
        self.adapter = adapter
        self.embedder = embedder
        self.pool = pool
        self.embeds = embeds
        self.parallel = adapter.device.type != "cpu" if parallel is None else parallel
        self.splitter = Splitter(adapter.count_tokens, max_tokens=adapter.spec.reference_tokens)

    def write(
        self,
        documents: Iterable[Document],
        *,
        added: Iterable[Reference] = (),
        states: Callable[[], Mapping[str, SourceState | None]] = dict,
        during: Callable[[Home], AbstractContextManager[object]] = nullcontext,
        whole: bool = False,
        catalogue: bool = False,
        progress: OnProgress | None = None,
    ) -> WriteReport:
        """Make the bank mirror the sources of these documents; makes the bank if there is none.

        References that it lacks are added. Those that a source had before, and has no more, are forgotten unless
        another source has them. All others keep their ids and bytes. ``states`` is called when all documents were read,
        and returns the state of each source; a source in it that has no document is emptied. References that are
        ``added`` come as they are, and whatever else their sources have stays.
        ``during`` is entered with the home before anything is changed, when the bank was found to fit, and left when
        all is written, the index included.

        With ``whole`` every document is one reference. With ``catalogue`` the model does not read them: they are cold
        until they are recalled (``recall.cold_start``) or written without it. Writing can be stopped at any instant and
        called again: each transaction is whole, and known references are passed over.

        Documents may come from an iterator: they are read once, to the end, before anything is written, and their
        references wait in a temporary file (`ReferenceSpool`). Memory does not grow with them; only the index does,
        which holds an embedding for each reference of the bank.

        Raises `InputError` before anything is written, `BankMismatchError` if the bank is another model's,
        `BankFullError`.
        """
        began, clock = time.perf_counter(), Clock()
        with ExitStack() as opened:
            if self.pool is not None:
                opened.enter_context(self.pool)
                self.pool.open(self.config, self.adapter.device)
            with clock.phase("split"):
                references = opened.enter_context(
                    closing(ReferenceSpool(documents, self.splitter, added, whole=whole, may_be_empty=True))
                )
                mirrored = states()
            assembly.make_index(self.config, self.embedder.dim)  # a mistake there should not show only at the end
            with clock.phase("codec"):
                bank = self._open(references)
            with closing(bank), during(bank.home):
                erasure.finish_begun(self.config, bank)
                pipeline = Pipeline(
                    self.adapter,
                    self.embedder,
                    clock,
                    batch_size=self.config.memory.batch_size,
                    parallel=self.parallel,
                )
                first = codec_training.Early()
                if not catalogue:
                    first = codec_training.train_if_due(self.config, bank, self.adapter, references, pipeline, progress)
                anew = self._encode_anew(bank, clock, progress)
                title = "Cataloguing references" if catalogue else "Writing memories"
                groups = Groups(bank, references, mirrored, catalogue=catalogue)

                def computed(count: int) -> None:
                    if progress:
                        progress(title, groups.known + count, len(references))

                coming = iter(groups)
                some = list(islice(coming, 2))
                if self.pool is None or len(some) < 2:
                    pipeline.run(chain(some, coming), computed)
                else:
                    setup, embedder = Setup.of(self.config, bank), self.embedder if self.embeds else None
                    distribute(self.pool, setup, pipeline, chain(some, coming), computed, embedder)
                if groups.stored:
                    computed(groups.stored)  # known references may have followed the last group
                with clock.phase("index"):
                    assembly.update_indexes(self.config, bank)
            return WriteReport(
                documents=references.documents,
                references=len(references),
                written=0 if catalogue else first.stored + groups.stored,
                known=groups.known - first.stored,
                bytes=max(0, pipeline.bytes - anew.saved),
                seconds=time.perf_counter() - began,
                phases=clock.seconds,
                catalogued=groups.stored if catalogue else 0,
                forgotten=groups.forgotten,
                codec=bank.codec.kind if first.trained else None,
                reencoded=len(anew.ids),
                left=anew.left,
            )

    def _encode_anew(self, bank: Bank, clock: Clock, progress: OnProgress | None) -> Reencoded:
        """Encode earlier memories by the codec that was just trained, or go on with it.

        It comes before new memories are written: their blocks take the room of old ones in the home's file.
        """
        if not reencoding.is_begun(bank):
            return Reencoded()
        with clock.phase("codec"):
            on_step = progress and partial(progress, "Encoding memories anew")
            return reencoding.reencode(bank, self.config.memory.batch_size, on_step=on_step)

    def _open(self, references: ReferenceSpool) -> Bank:
        """The bank after its manifest was found to fit, or a new one with the codec that it begins with."""
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
        if not len(references):
            raise InputError("the corpus is empty: there is nothing to remember")
        first = codec_training.beginning(self.config, adapter.spec)
        manifest = Manifest(
            model=adapter.model_fingerprint,
            model_name=adapter.name,
            tokenizer=adapter.tokenizer_fingerprint,
            sink=adapter.sink,
            spec=adapter.spec,
            codec_kind=self.config.codec.kind if first.planned is None else first.codec.kind,
            codec_options=dict(first.codec.options),
            codec=first.codec.fingerprint,
            embedder=self.embedder.fingerprint,
            embedder_name=self.config.embedder.path,
            dim=self.embedder.dim,
            model_settings=dict(adapter.model_settings),
            planned=first.planned,
            headings=True,
        )
        return Bank.create(self.config.bank, open_home, manifest, first.codec, first.slot_bytes)
