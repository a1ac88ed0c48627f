"""`write_bank`: the bank of an evaluation, which holds the evaluated references and nothing else."""

from collections.abc import Sequence

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.bank.bank import Bank
from m3runtime.config.schema import Config
from m3runtime.documents.document import Document
from m3runtime.errors import InputError
from m3runtime.retrieval.embedder import Embedder
from m3runtime.writing.writer import OnProgress, Writer


def write_bank(
    config: Config,
    adapter: Adapter,
    embedder: Embedder,
    documents: Sequence[Document],
    progress: OnProgress,
    *,
    whole: bool = True,
) -> None:
    """Write documents, each a reference if they are ``whole``, into the bank; resumes where it was stopped.

    Raises `InputError` if the bank already holds any other text, such as a held-out text or the facts of another seed;
    if documents are split, any other source.
    """
    _check(config, documents, whole=whole)
    Writer(config, adapter, embedder).write(documents, whole=whole, progress=progress)


def _check(config: Config, documents: Sequence[Document], *, whole: bool) -> None:
    if not Bank.exists(config.bank, assembly.open_home(config)):
        return
    bank = assembly.open_bank(config, read_only=True)
    try:
        there = (
            {one.text for one in bank.home.references(bank.home.ids()) if one} if whole else set(bank.home.sources())
        )
    finally:
        bank.close()
    if there - {document.text if whole else document.source for document in documents}:
        raise InputError(f"{config.bank} remembers other texts than these; choose another --out")
