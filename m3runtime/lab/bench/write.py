"""``m3 bench write``: the speed of writing memories against the speed of the model alone."""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from m3runtime import assembly
from m3runtime.adapters.answers import Prompt
from m3runtime.adapters.base import Adapter
from m3runtime.bank.bank import Bank
from m3runtime.bank.codecs import CODEC, codec_file
from m3runtime.config.schema import Config
from m3runtime.documents.document import Document
from m3runtime.documents.reading import read_documents
from m3runtime.documents.splitting import Splitter
from m3runtime.documents.spool import ReferenceSpool
from m3runtime.lab.bench.banks import bank_references, full_pieces
from m3runtime.lab.bench.comparison import Comparable
from m3runtime.lab.bench.timing import threads, timed
from m3runtime.lab.results import Result, Spread
from m3runtime.retrieval.embedder import Embedder
from m3runtime.writing import codec_files
from m3runtime.writing.encoding import GROUP, batches
from m3runtime.writing.fitting import fit_codec
from m3runtime.writing.pipeline import PHASES
from m3runtime.writing.writer import OnProgress, Writer, WriteReport

PLAIN = "the model alone"
"""The model as its own library runs it."""
ENCODE = "memories alone"
"""Memories as the adapter computes them, up to the last keys and values that are kept."""
WRITE = "the whole write"


@dataclass(frozen=True, slots=True)
class WriteSettings:
    """The settings of ``m3 bench write``."""

    references: int = 64
    rounds: int = 5
    threads: int = 2
    """CPU threads."""
    seed: int = 0


@dataclass(frozen=True, slots=True)
class WriteBench(Result):
    """The results of ``m3 bench write``."""

    settings: WriteSettings
    model: str
    device: str
    dtype: str
    batch: int
    """References in one batch of the model."""
    tokens: int
    """Tokens of all references."""
    config: Mapping[str, Any]
    fingerprints: Mapping[str, str]
    seconds: Mapping[str, Spread]
    """Seconds for all references, by contender: `PLAIN` if the adapter has a baseline, `ENCODE` and `WRITE`."""
    kept: Mapping[str, Spread]
    """The throughput of `WRITE` over the throughput of each other contender in the same round."""
    shares: Mapping[str, Spread]
    """The share of `WRITE` by phase (`m3runtime.writing.pipeline.PHASES`); phases may overlap."""
    overlapping: bool
    """True if encoding and embedding overlapped with the model. Commits always do."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = f"{self.settings.references} references of {self.tokens} tokens, {self.batch} at once"
        times = Table("", "seconds (quartiles)", "tokens/s", "kept by the write", title=title)
        for name, spread in self.seconds.items():
            kept = "" if name == WRITE else self.kept[name].show(3)
            times.add_row(name, spread.show(2), f"{self.tokens / spread.median:,.0f}", kept)
        yield times
        shares = Table("phase", "of the whole write", title="Where the time goes")
        for phase, spread in self.shares.items():
            shares.add_row(phase, spread.show(3))
        yield shares
        how = "in parallel with the model" if self.overlapping else "in turn with the model"
        yield (
            f"encoding and embedding {how}; {self.model}, {self.dtype} on {self.device}, "
            f"{self.settings.threads} threads; batch {self.batch}"
        )


def bench_write(
    config: Config, adapter: Adapter, corpus: Sequence[Path], settings: WriteSettings, progress: OnProgress
) -> WriteBench:
    """Let the model read the same references alone and for a new bank, in turns.

    The references are pieces of the corpus as long as a reference may be, or else the first references of the bank. The
    codec is that of ``codec.file``, or that of the bank, or is trained on these references first. Raises `InputError`
    if there is neither bank nor corpus, or the corpus is too short.
    """
    embedder = assembly.open_embedder(config)
    # Next to the bank, so that commits go to the same drive.
    drive = config.bank.parent if config.bank.parent.is_dir() else None
    with (
        threads(settings.threads),
        tempfile.TemporaryDirectory(dir=drive, prefix=".m3-bench-") as folder,
    ):
        documents = _documents(config, adapter, corpus, settings)
        own = _with_codec(config, adapter, documents, Path(folder), progress)
        try:
            return _measure(own, adapter, embedder, documents, settings, progress)
        finally:
            embedder.close()


def _documents(config: Config, adapter: Adapter, corpus: Sequence[Path], settings: WriteSettings) -> list[Document]:
    """The references, each as a document."""
    if corpus:
        return full_pieces(adapter, list(read_documents(corpus)), settings.references, settings.seed)
    return [Document(one.places[0].name, one.text) for one in bank_references(config, settings.references)]


def _with_codec(
    config: Config, adapter: Adapter, documents: Sequence[Document], folder: Path, progress: OnProgress
) -> Config:
    """The configuration of a new bank in ``folder``, with a trained codec."""
    own = config.model_copy(update={"bank": folder / "bank"})
    if config.codec.file is not None:
        return own
    codec = codec_files.configured(config, adapter.spec)
    if codec.trained:
        return own
    has_codec = False
    if Bank.exists(config.bank, assembly.open_home(config, read_only=True)):
        bank = assembly.open_bank(config, read_only=True)
        try:
            adapter.check(bank.manifest, bank.path)
            codec_files.check_bank(config, bank)
            file = codec_file(config.bank, bank.manifest.codec)
            has_codec = bank.manifest.planned is None
        finally:
            bank.close()
    if not has_codec:
        texts = [document.text for document in documents]
        fit_codec(codec, adapter, texts, config.memory.batch_size, partial(progress, "Training the codec"))
        file = folder / CODEC
        codec.save(file)
    return own.model_copy(update={"codec": config.codec.model_copy(update={"file": file})})


def _measure(
    config: Config,
    adapter: Adapter,
    embedder: Embedder,
    documents: Sequence[Document],
    settings: WriteSettings,
    progress: OnProgress,
) -> WriteBench:
    splitter = Splitter(adapter.count_tokens, max_tokens=adapter.spec.reference_tokens)
    with closing(ReferenceSpool(documents, splitter, whole=True)) as spool:
        references = list(spool)
    groups = [references[start : start + GROUP] for start in range(0, len(references), GROUP)]
    size = config.memory.batch_size
    read = [[group[row].text for row in rows] for group in groups for rows in batches(group, size)]
    writer = Writer(config, adapter, embedder)
    reports: list[WriteReport] = []
    contenders: dict[str, Callable[[], object]] = {
        ENCODE: lambda: [adapter.encode(texts) for texts in read],
        WRITE: lambda: reports.append(writer.write(documents, whole=True)),
    }
    if isinstance(adapter, Comparable):
        contenders[PLAIN] = _plain(adapter, read, max(reference.tokens for reference in references))
    before = {WRITE: lambda: shutil.rmtree(config.bank, ignore_errors=True)}
    rounds = settings.rounds + 1
    seconds = timed(contenders, settings.rounds, lambda done: progress("Measuring times", done, rounds), before)
    progress("Measuring times", rounds, rounds)
    of_write, counted = seconds[WRITE], reports[1:]
    return WriteBench(
        settings=replace(settings, references=len(references)),
        model=adapter.name,
        device=str(adapter.device),
        dtype=str(adapter.dtype).removeprefix("torch."),
        batch=size,
        tokens=sum(reference.tokens for reference in references),
        config=config.model_dump(mode="json"),
        fingerprints={"model": adapter.model_fingerprint, "embedder": embedder.fingerprint},
        seconds={name: Spread.of(found) for name, found in seconds.items()},
        kept={name: Spread.ratio(found, of_write) for name, found in seconds.items() if name != WRITE},
        shares={phase: Spread.of([one.phases[phase] / one.seconds for one in counted]) for phase in PHASES},
        overlapping=writer.parallel,
    )


def _plain(model: Comparable, read: Sequence[Sequence[str]], tokens: int) -> Callable[[], object]:
    """A function that lets the baseline read the same batches; it generates one token, which takes no further pass.

    It uses the first variant of the baseline, the default of its library.
    """
    baseline = model.baseline()
    room = tokens + 2  # with BOS and the new token
    prompts = [[Prompt(text) for text in texts] for texts in read]
    return lambda: [baseline.generate(some, 1, baseline.variants[0], room) for some in prompts]
