"""Erasure: what was forgotten leaves no byte in the files of a bank, also if the process is killed in between."""

import shutil

from m3runtime import assembly
from m3runtime.bank.bank import Bank
from m3runtime.bank.erasures import Erasure, Erasures
from m3runtime.config.schema import Config
from m3runtime.errors import TierError
from m3runtime.storage.home import Home
from m3runtime.writing.fitting import TRAINING
from m3runtime.writing.forgetting import discard


def begin(home: Home) -> None:
    """Record that an erasure begins, before anything is forgotten: a command that finds the record finishes it."""
    Erasures.of(home).with_one_begun().write(home)


def finish(config: Config, bank: Bank) -> Erasure:
    """Erase what was forgotten from tiers, index, home and unfinished trainings, and record that it was done.

    Killed at any instant, the next `finish` does it. Raises `TierError` if a tier does not discard what it holds,
    `BankFullError` if there is no room for the work, `IndexFileError` and `TierReadOnlyError`; then it stays begun.
    """
    begin(bank.home)
    if (bank.path / TRAINING).exists():  # an interrupted one, and what it computed of texts
        shutil.rmtree(bank.path / TRAINING)
    if failed := discard(config, bank, ()):
        raise TierError(f"tier {failed[0]} failed, and may hold what was forgotten; mend it, then run `m3 compact`")
    assembly.rebuild_indexes(config, bank)
    bank.home.compact()
    erasures = Erasures.of(bank.home).with_one_done(bank.home)
    erasures.write(bank.home)
    return erasures.done[-1]


def finish_begun(config: Config, bank: Bank) -> Erasure | None:
    """`finish` an erasure that began and has not ended; None if there is none."""
    return finish(config, bank) if Erasures.of(bank.home).begun else None
