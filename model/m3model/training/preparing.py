"""`prepare`: from the texts of ``train.data`` to token sequences and what they retrieve."""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from m3model.engine.markers import literal_tokenizer
from m3model.training.retrieving import retrieve
from m3model.training.sequences import NOTHING, Prepared, TokenRows, cut_sequences
from m3runtime import assembly
from m3runtime.config.schema import Config, DocumentsConfig
from m3runtime.config.train import TrainConfig
from m3runtime.documents.document import Document
from m3runtime.documents.reading import read_documents
from m3runtime.documents.splitting import Splitter
from m3runtime.documents.spool import ReferenceSpool
from m3runtime.errors import ConfigError
from m3runtime.storage.files import sync_folder
from m3runtime.writing.writer import OnProgress


def prepare(config: Config, settings: TrainConfig, tokenizer: Any, progress: OnProgress) -> Prepared:
    """Sequences and what they retrieve, kept in ``train.out``; opened if a run prepared them already.

    Texts are read document by document, several times, and a long file in pieces: tokens go into files, references into
    a temporary one. In memory is the index, with an embedding for each reference. Raises `ConfigError` if the run in
    ``train.out`` began with other texts.
    """
    read = partial(read_documents, fields=DocumentsConfig(text_field=settings.text_field))
    data, references = partial(read, settings.data), partial(read, settings.references or settings.data)
    folder = settings.out / f"data-{_fingerprint([data(), references()] if settings.references else [data()])}"
    if folder.exists():
        return Prepared.open(folder)
    unfinished = folder.with_name(f"{folder.name}.partial")
    for left in settings.out.glob("data-*.partial"):
        shutil.rmtree(left)
    if any(settings.out.glob("data-*")):
        raise ConfigError(
            f"train.data: the texts are not those that the run in {settings.out} began with; choose another train.out"
        )
    unfinished.mkdir()
    _write(unfinished, config, settings, tokenizer, progress, data(), references)
    for file in unfinished.rglob("*"):
        if file.is_file():
            with file.open("r+b") as written:
                os.fsync(written.fileno())
    unfinished.replace(folder)
    sync_folder(settings.out)
    return Prepared.open(folder)


def _write(
    folder: Path,
    config: Config,
    settings: TrainConfig,
    tokenizer: Any,
    progress: OnProgress,
    data: Iterable[Document],
    references: Callable[[], Iterable[Document]],
) -> None:
    """Write the files of `Prepared`."""
    literal = literal_tokenizer(tokenizer)  # as references of a bank are read

    def ids(text: str) -> list[int]:
        return literal(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[no-any-return]

    def decode(tokens: Sequence[int]) -> str:
        text: str = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    tokens = (map(ids, document.blocks()) for document in data)
    rows = cut_sequences(tokens, settings.sequence_tokens, tokenizer.eos_token_id, pack=settings.pack)
    TokenRows.write(folder / "sequences", rows)
    sequences = TokenRows.open(folder / "sequences")
    chunk = config.recall.chunk_tokens
    if not settings.memory.steps:
        TokenRows.write(folder / "references", [])
        np.save(folder / "retrieved.npy", np.full((len(sequences), 1), NOTHING, np.int32))
        return
    splitter = Splitter(lambda text: len(ids(text)), max_tokens=config.memory.reference_tokens)
    with closing(ReferenceSpool(references(), splitter)) as spool, closing(assembly.open_embedder(config)) as embedder:
        TokenRows.write(folder / "references", (ids(one.text) for one in spool))
        retrieved = retrieve(
            sequences,
            spool,
            decode,
            embedder,
            assembly.make_index(config, embedder.dim),
            chunk_tokens=chunk,
            share=settings.overlap,
            progress=partial(progress, "Retrieving references"),
        )
    np.save(folder / "retrieved.npy", retrieved)


def _fingerprint(corpora: Iterable[Iterator[Document]]) -> str:
    """Sixteen hex digits that stand for all texts."""
    digest = xxhash.xxh3_64()
    for corpus in corpora:
        for document in corpus:
            for block in document.blocks():
                digest.update(block.encode())
            digest.update(b"\0document")
        digest.update(b"\0corpus")
    return digest.hexdigest()
