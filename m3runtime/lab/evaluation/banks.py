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
    references: Sequence[Document],
    progress: OnProgress,
) -> None:
    """Write references, each whole, into the bank; resumes where it was stopped.

    Raises `InputError` if the bank already holds any other text, such as a held-out text or the facts of another seed.
    """
    _check(config, references)
    Writer(config, adapter, embedder).write(references, whole=True, progress=progress)


def _check(config: Config, references: Sequence[Document]) -> None:
    if not Bank.exists(config.bank, assembly.open_home(config)):
        return
    bank = assembly.open_bank(config, read_only=True)
    try:
        there = bank.home.references(bank.home.ids())
    finally:
        bank.close()
    wanted = {reference.text for reference in references}
    if any(reference is not None and reference.text not in wanted for reference in there):
        raise InputError(f"{config.bank} remembers other texts than these; choose another --out")
