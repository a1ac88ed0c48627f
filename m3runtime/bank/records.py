"""References and embeddings of a home in which some records may be damaged: the others are read all the same."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from m3runtime.documents.reference import Reference
from m3runtime.errors import BankFullError, RecordError, TierReadOnlyError
from m3runtime.memory.block import Ids
from m3runtime.retrieval.embedder import Embeddings
from m3runtime.storage.home import Home


def references(home: Home, ids: Ids) -> tuple[list[Reference | None], dict[int, str]]:
    """The references of ids, None where one is unknown or its record damaged; and what is wrong with the latter."""
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
    """The embeddings of ids in batches, as `Home.embeddings` gives them: those that are there and sound.

    What is wrong with the others is put into ``damaged``. ``dim`` is the length that they must have, or None.
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


def quarantined(home: Home) -> dict[int, str]:
    """What is quarantined, and why. Of a home with damaged records of that, only one whose record is damaged."""
    try:
        return dict(home.quarantined())
    except RecordError as error:
        return {} if error.id is None else {error.id: str(error)}


def set_apart(home: Home, damaged: Mapping[int, str]) -> None:
    """Quarantine these for the reasons given. In a home that cannot be written to they are merely left out."""
    for id, why in damaged.items():
        try:
            home.quarantine(id, why)
        except (TierReadOnlyError, BankFullError):
            return


def _read(home: Home, ids: Ids, damaged: dict[int, str]) -> list[tuple[Ids, Embeddings]]:
    """At once if none is damaged, else one by one."""
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
