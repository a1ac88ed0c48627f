"""Forgetting by path, and what is left of forgotten memories outside the home."""

import re
from collections.abc import Iterable, Sequence
from contextlib import closing
from fnmatch import translate

from m3runtime import assembly
from m3runtime.bank.bank import Bank
from m3runtime.config.schema import Config
from m3runtime.documents.sources import SourceNames, is_within
from m3runtime.errors import InputError
from m3runtime.memory.block import as_ids
from m3runtime.storage.hierarchy import Hierarchy
from m3runtime.writing.moving import Moves


def sources_of(given: str, names: SourceNames, sources: Iterable[str]) -> list[tuple[str, str | None]]:
    """The sources that a file, a folder, a pattern or a name stands for, each with the record if it names one.

    ``*`` in a pattern stands for any characters, ``/`` too. Raises `InputError` if there is none.
    """
    known, name = list(sources), names.name(given)
    if found := [source for source in known if source == given] or [one for one in known if is_within(one, name)]:
        return [(source, None) for source in found]
    pattern = re.compile(translate(name))
    if found := [source for source in known if pattern.match(source)]:
        return [(source, None) for source in found]
    for whole in (given, name):
        source, colon, record = whole.partition(":")
        while colon:
            if source in known:
                return [(source, record)]
            more, colon, record = record.partition(":")
            source = f"{source}:{more}"
    raise InputError(f"the bank remembers nothing from {given}; `m3 inspect --all` lists its sources")


def forget_expired(config: Config, bank: Bank, today: str) -> list[int]:
    """Forget the places whose last day has passed, and references that have no other. Returns the forgotten ids.

    An unchanged file that has expired is not read again when it is written again. Raises `BankFullError` and
    `TierReadOnlyError`.
    """
    moves = Moves(bank.home)
    moves.expire(today)
    drop_traces(config, bank, moves.forgotten)
    return moves.forgotten


def drop_traces(config: Config, bank: Bank, ids: Sequence[int]) -> list[str]:
    """Drop what the home has forgotten from the tiers that outlive the process, and from the index.

    Returns the names of tiers that failed: they discard what they still hold when they are used again.
    """
    failed = discard(config, bank, ids)
    assembly.update_indexes(config, bank)
    return failed


def discard(config: Config, bank: Bank, ids: Sequence[int]) -> list[str]:
    """Discard these ids, and all that the home does not have, in the tiers that outlive the process.

    Returns the names of tiers that failed.
    """
    tiers = assembly.open_tiers(
        config, bank.slot_bytes, assembly.device(config), identity=bank.identity, persistent=True
    )
    with closing(Hierarchy(tiers, bank.home, bank.codecs)) as hierarchy:
        if len(ids):
            hierarchy.discard(as_ids(ids))
        return [tier.name for tier in hierarchy.stats() if tier.faults]
