"""`exported`: the records of a bank."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np

from m3runtime.bank import records
from m3runtime.bank.exchange.record import Record
from m3runtime.documents import expiry
from m3runtime.memory.block import as_ids
from m3runtime.retrieval.embedder import Embeddings
from m3runtime.storage.home import Home

_BATCH = 1024


def exported(
    home: Home,
    embedder: str,
    dim: int,
    damaged: dict[int, str],
    *,
    embeddings: bool = True,
    today: Callable[[], str] = expiry.today,
) -> Iterator[tuple[int, Record]]:
    """All references that have not expired with their ids, ascending, and their embeddings, which ``embedder`` made.

    Cold references and those whose block is quarantined are among them. A reference that cannot be read is left out,
    and its damage is put into ``damaged``; so is that of an embedding. A batch is in memory at a time, and is one
    snapshot of the home.
    """
    ids = np.union1d(home.ids(), as_ids(list(records.quarantined(home))))
    for start in range(0, len(ids), _BATCH):
        some = ids[start : start + _BATCH]
        found, wrong = records.references(home, some)
        damaged |= wrong
        vectors = dict[int, Embeddings]()
        if embeddings:
            for known, rows in records.embeddings(home, some, dim, damaged):
                vectors |= dict(zip(known.tolist(), rows, strict=True))
        for id, one in zip(some.tolist(), found, strict=True):
            if one is not None and (places := one.living(today())):
                vector = vectors.get(id)
                yield id, Record(replace(one, places=places), vector, "" if vector is None else embedder)
