"""`wrong_vectors`: a comparison of an index with the home's embeddings."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from m3runtime import assembly
from m3runtime.bank import records
from m3runtime.bank.bank import Bank
from m3runtime.config.schema import Config
from m3runtime.memory.block import Ids
from m3runtime.retrieval.embedder import Embeddings
from m3runtime.retrieval.index import Index

_ROWS = 256
_NEAREST = 8
_SUSPECTS = 1024
"""The largest number of ids that are compared again: any wrong one has the whole index rebuilt."""
_TOLERANCE = 1e-3


def wrong_vectors(config: Config, bank: Bank, index: Index, ids: Ids, progress: Callable[[int, int], None]) -> Ids:
    """The ids among ``ids`` under which ``index`` holds another vector than the home. Removes vectors from the index.

    A memory's own embedding must find it, with the score that it has in an index made of the home's embeddings.
    """
    dim, damaged = bank.manifest.dim, dict[int, str]()
    suspects, done = [ids[:0]], 0

    def low(ids: Ids, vectors: Embeddings, most: int) -> npt.NDArray[np.bool_]:
        sound = assembly.make_index(config, dim)
        sound.add(ids, vectors)
        return _scores(index, ids, vectors, most) < _scores(sound, ids, vectors, len(ids)) - _TOLERANCE

    for some, vectors in records.embeddings(bank.home, ids, dim, damaged):
        for start in range(0, len(some), _ROWS):
            part, of_part = some[start : start + _ROWS], vectors[start : start + _ROWS]
            suspects.append(part[low(part, of_part, _NEAREST)])
            done += len(part)
            progress(done, len(ids))
    # An approximate index may miss an id, or have many equal vectors. Among few vectors it is exact.
    suspect = np.concatenate(suspects)[:_SUSPECTS]
    index.remove(np.setdiff1d(index.ids(), suspect))
    found = [suspect[:0]]
    for some, vectors in records.embeddings(bank.home, suspect, dim, damaged):
        found.append(some[low(some, vectors, len(suspect))])
    return np.concatenate(found)


def _scores(index: Index, ids: Ids, vectors: Embeddings, most: int) -> npt.NDArray[np.float32]:
    """The score with which each vector finds its own id among the ``most`` nearest, or -2."""
    found, scores = index.search(vectors, most)
    own: npt.NDArray[np.float32] = np.where(found == ids[:, None], scores, np.float32(-2)).max(axis=1, initial=-2)
    return own
