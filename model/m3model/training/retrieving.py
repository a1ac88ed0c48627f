"""Which reference each chunk of the training text retrieves: by the project's own embedder and index."""

from collections.abc import Callable, Sequence

import numpy as np

from m3model.training.sequences import NOTHING, Rows, Tokens
from m3runtime.documents.overlap import overlap
from m3runtime.retrieval.embedder import Embedder
from m3runtime.retrieval.index import Index
from m3runtime.retrieval.retriever import Retriever

_CANDIDATES = 8
"""Nearest references that are looked at: of those, the first one that the text does not hold already."""
_AT_ONCE = 256
"""Chunks that are embedded and searched together."""

OnDone = Callable[[int, int], None]


def retrieve(
    sequences: Rows,
    texts: Sequence[str],
    decode: Callable[[Sequence[int]], str],
    embedder: Embedder,
    index: Index,
    *,
    chunk_tokens: int,
    share: float,
    progress: OnDone,
) -> Tokens:
    """For each chunk of each sequence the nearest of the references ``texts``, int32 ``[sequences, chunks]``.

    A reference of which more than ``share`` stands in the sequence is passed over (Memory³, section 3.6; `overlap`), so
    that memories tell what the text does not. `NOTHING` where none is left. ``index`` is empty, and filled here.
    """
    for start in range(0, len(texts), _AT_ONCE):
        part = list(texts[start : start + _AT_ONCE])
        index.add(np.arange(start, start + len(part), dtype=np.uint64), embedder.embed_references(part))
    retriever = Retriever(embedder, index, memories=_CANDIDATES)
    chunks = -(-sequences.ids.shape[1] // chunk_tokens)
    found = np.full((len(sequences), chunks), NOTHING, np.int32)
    places = [
        (row, chunk) for row in range(len(sequences)) for chunk in range(-(-int(sequences.counts[row]) // chunk_tokens))
    ]
    whole, of = "", -1
    for start in range(0, len(places), _AT_ONCE):
        progress(start, len(places))
        asked = places[start : start + _AT_ONCE]
        queries = [
            decode(sequences.row(row)[chunk * chunk_tokens : (chunk + 1) * chunk_tokens].tolist())
            for row, chunk in asked
        ]
        for (row, chunk), matches in zip(asked, retriever.search(queries), strict=True):
            if row != of:
                whole, of = decode(sequences.row(row).tolist()), row
            kept = (match.id for match in matches if overlap(texts[match.id], whole) <= share)
            found[row, chunk] = next(kept, NOTHING)
    progress(len(places), len(places))
    return found
