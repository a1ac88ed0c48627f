"""`bank_for`: the bank of a bench, either the configured one or a temporary one of full references."""

import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.bank.bank import Bank
from m3runtime.config.schema import Config
from m3runtime.documents.document import Document
from m3runtime.documents.reading import one_word, read_documents
from m3runtime.documents.reference import Reference
from m3runtime.documents.splitting import Splitter
from m3runtime.documents.spool import ReferenceSpool
from m3runtime.errors import InputError
from m3runtime.writing.writer import OnProgress, Writer

_NEARLY = 0.9
"""Least share of the most tokens that a full reference has; cut out of its text it may have fewer than all."""


@contextmanager
def bank_for(
    config: Config, adapter: Adapter | None, corpus: Sequence[Path], references: int, progress: OnProgress
) -> Iterator[Config]:
    """A configuration whose bank exists: this one, or with a ``corpus`` one of a temporary bank.

    The temporary bank has ``references`` pieces of the corpus at most, each as long as a reference may be; it is
    removed at the end of the block. Raises `InputError` if there is no bank and no corpus, or the corpus is too short.
    """
    if not corpus:
        _check(config)
        yield config
        return
    adapter = adapter or assembly.open_adapter(config)
    pieces = full_pieces(adapter, list(read_documents(corpus)), references)
    with tempfile.TemporaryDirectory(prefix="m3-bench-") as folder:
        own = config.model_copy(update={"bank": Path(folder) / "bank"})
        embedder = assembly.open_embedder(config)
        try:
            Writer(own, adapter, embedder).write(pieces, whole=True, progress=progress)
        finally:
            embedder.close()
        yield own


def _check(config: Config) -> None:
    if not Bank.exists(config.bank, assembly.open_home(config, read_only=True)):
        raise InputError(f"there is no bank at {config.bank}; give texts with --corpus")


def bank_references(config: Config, most: int | None = None) -> list[Reference]:
    """The first ``most`` references of the configured bank, or all. Raises `InputError` if there is no bank."""
    _check(config)
    with closing(assembly.open_bank(config, read_only=True)) as bank:
        return [one for one in bank.home.references(bank.home.ids()[:most]) if one is not None]


def reference_texts(config: Config, adapter: Adapter, corpus: Sequence[Path]) -> list[str]:
    """The texts of the references of a corpus, or without one of the configured bank. Raises `InputError`."""
    if not corpus:
        return [one.text for one in bank_references(config)]
    splitter = Splitter(adapter.count_tokens, max_tokens=adapter.spec.reference_tokens)
    with closing(ReferenceSpool(read_documents(corpus), splitter)) as references:
        return [one.text for one in references]


def full_pieces(adapter: Adapter, documents: Sequence[Document], most: int, seed: int = 0) -> list[Document]:
    """At most ``most`` random pieces of documents, each of as many tokens as a reference may have, or a tenth fewer."""
    size = adapter.spec.reference_tokens
    found: dict[str, Document] = {}
    for document in documents:
        for piece in adapter.cut(document.text, size):
            text = piece.strip()
            if text and not one_word(text) and _NEARLY * size <= adapter.count_tokens(text) <= size:
                found.setdefault(text, Document(document.name, text))
    if not found:
        raise InputError(f"the corpus has no text of {size} tokens; give more with --corpus")
    pieces = list(found.values())
    return random.Random(seed).sample(pieces, min(most, len(pieces)))
