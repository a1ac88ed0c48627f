"""The reference that each chunk of the training text retrieves, by the project's own embedder and index."""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import numpy as np

from m3model.training.sequences import NOTHING, TokenRows, Tokens
from m3runtime.documents.overlap import overlap
from m3runtime.documents.spool import ReferenceSpool
from m3runtime.retrieval.embedder import Embedder
from m3runtime.retrieval.index import Index
from m3runtime.retrieval.retriever import Retriever

_CANDIDATES = 8
"""Nearest references that are looked at: a chunk gets the first of them that the text does not hold already."""
_AT_ONCE = 256
"""Chunks that are embedded and searched together."""

OnDone = Callable[[int, int], None]


def retrieve(
    sequences: TokenRows,
    references: ReferenceSpool,
    decode: Callable[[Sequence[int]], str],
    embedder: Embedder,
    index: Index,
    *,
    chunk_tokens: int,
    share: float,
    progress: OnDone,
) -> Tokens:
    """For each chunk of each sequence the place of the nearest reference, int32 ``[sequences, chunks]``.

    A reference of which more than ``share`` stands in the sequence is passed over (Memory³, section 3.6; `overlap`), so
    that memories tell what the text does not. `NOTHING` where none is left. ``index`` is empty, and filled here.
    """
    source = iter(references)
    for start in range(0, len(references), _AT_ONCE):
        texts = [one.headed for one in islice(source, _AT_ONCE)]
        index.add(np.arange(start, start + len(texts), dtype=np.uint64), embedder.embed_references(texts))
    retriever = Retriever(embedder, index, memories=_CANDIDATES)
    chunks = -(-sequences.counts // chunk_tokens)
    found = np.full((len(sequences), int(chunks.max(initial=0))), NOTHING, np.int32)

    def places() -> Iterator[tuple[int, int]]:
        for row, count in enumerate(chunks.tolist()):
            for chunk in range(count):
                yield row, chunk

    left, all_chunks = places(), int(chunks.sum())
    whole, of = "", -1
    for start in range(0, all_chunks, _AT_ONCE):
        progress(start, all_chunks)
        asked = list(islice(left, _AT_ONCE))
        queries = [
            decode(sequences.row(row)[chunk * chunk_tokens : (chunk + 1) * chunk_tokens].tolist())
            for row, chunk in asked
        ]
        for (row, chunk), matches in zip(asked, retriever.search(queries), strict=True):
            if row != of:
                whole, of = decode(sequences.row(row).tolist()), row
            kept = (match.id for match in matches if overlap(references[match.id].text, whole) <= share)
            found[row, chunk] = next(kept, NOTHING)
    progress(all_chunks, all_chunks)
    return found
