"""Reads of references and embeddings that pass over damaged records."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from m3runtime.documents.reference import Reference
from m3runtime.errors import BankFullError, RecordError, TierReadOnlyError
from m3runtime.memory.block import Ids, as_ids
from m3runtime.retrieval.embedder import Embeddings
from m3runtime.storage.home import Home


def references(home: Home, ids: Ids) -> tuple[list[Reference | None], dict[int, str]]:
    """The reference of each id, or None if it is unknown or damaged, and the damage by id."""
    try:
        return home.references(ids), {}
    except RecordError as error:
        if len(ids) == 1:
            return [None], {int(ids[0]): str(error)}
    found: list[Reference | None] = []
    damaged: dict[int, str] = {}
    for row in range(len(ids)):
        one, wrong = references(home, ids[row : row + 1])
        found += one
        damaged |= wrong
    return found, damaged


def embeddings(home: Home, ids: Ids, dim: int | None, damaged: dict[int, str]) -> Iterator[tuple[Ids, Embeddings]]:
    """The sound embeddings of ids in batches: ``ids[n]`` and ``float32[n, dim]``.

    The damage of the others is put into ``damaged``. ``dim`` is the length that embeddings must have, or None.
    """
    for start in range(0, len(ids), 4096):
        wanted = ids[start : start + 4096]
        for some, vectors in _read(home, wanted, damaged):
            wanted = np.setdiff1d(wanted, some)
            if dim is not None and vectors.shape[1] != dim:
                _note(damaged, some, f"the embedding has {vectors.shape[1]} numbers, not {dim}")
                continue
            good = np.isfinite(vectors).all(axis=1)
            _note(damaged, some[~good], "the embedding is not finite")
            if good.any():
                yield some[good], vectors[good]
        _note(damaged, wanted, "there is no embedding")


def expired(home: Home, today: str) -> Ids:
    """The ids of the references that have expired in all of their places, or that cannot be read and may have."""
    due = np.unique(np.concatenate([*home.expiring(today).values(), as_ids(())]))
    found, _ = references(home, due)
    return due[[one is None or not one.living(today) for one in found]]


def quarantined(home: Home) -> dict[int, str]:
    """Maps quarantined ids to the reasons; if such a record is damaged, only the id of that record."""
    try:
        return dict(home.quarantined())
    except RecordError as error:
        return {} if error.id is None else {error.id: str(error)}


def set_apart(home: Home, damaged: Mapping[int, str]) -> None:
    """Quarantine ids for the given reasons. Does nothing in a home that is read-only or full."""
    for id, why in damaged.items():
        try:
            home.quarantine(id, why)
        except (TierReadOnlyError, BankFullError):
            return


def _read(home: Home, ids: Ids, damaged: dict[int, str]) -> list[tuple[Ids, Embeddings]]:
    """Read embeddings at once, or one by one if some are damaged."""
    try:
        return list(home.embeddings(ids))
    except RecordError as error:
        if len(ids) == 1:
            damaged[int(ids[0])] = str(error)
            return []
    return [found for row in range(len(ids)) for found in _read(home, ids[row : row + 1], damaged)]


def _note(damaged: dict[int, str], ids: Iterable[np.uint64], what: str) -> None:
    for id in ids:
        damaged.setdefault(int(id), what)
