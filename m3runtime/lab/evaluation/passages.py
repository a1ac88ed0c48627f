"""Passages that a model is scored on, and the references that their documents give without them."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from m3runtime.documents.overlap import overlapping
from m3runtime.documents.reading import Document, one_word
from m3runtime.documents.splitting import Splitter
from m3runtime.errors import InputError


class Tokens(Protocol):
    """What cutting texts takes of an `m3runtime.adapters.base.Adapter`."""

    def count_tokens(self, text: str) -> int:
        """See `Adapter.count_tokens`."""

    def cut(self, text: str, tokens: int) -> list[str]:
        """See `Adapter.cut`."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A part of a document that no reference has."""

    source: str
    start: int
    """Where in the document's text it begins, in characters."""
    chunks: tuple[str, ...]
    """The prompt, then the chunks that are scored. Each has as many tokens alone as it has among the others."""

    @property
    def prompt(self) -> str:
        """What the model is given."""
        return self.chunks[0]

    @property
    def continuation(self) -> str:
        """What is scored."""
        return "".join(self.chunks[1:])

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.chunks)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents, parted into what is scored and what is remembered."""

    passages: tuple[HeldOut, ...]
    references: tuple[Document, ...]
    """Each fits a reference whole; equal texts stand once. ``source`` is that of the document it is from."""
    dropped: int
    """References that were left out because a passage has too much of them."""
    chunk_tokens: int
    """Tokens of each of a passage's chunks."""


def hold_out(
    documents: Sequence[Document],
    tokens: Tokens,
    *,
    passages: int,
    chunk_tokens: int,
    reference_tokens: int,
    continuation: int = 3,
    per_document: int = 2,
    share: float = 2 / 3,
    seed: int = 0,
) -> Corpus:
    """Hold passages out of documents, and split the rest into references of at most ``reference_tokens`` tokens.

    A passage is a prompt of one chunk and ``continuation`` scored chunks, from the last two thirds of a document at
    least twice as long; a document gives ``per_document`` passages at most, and never more than half of itself. Which
    ones depends on the documents and the seed alone. References of which any passage has more than ``share``
    (`m3runtime.documents.overlap`) are dropped.

    Raises `InputError` if there is too little text.
    """
    chosen = _choose(documents, tokens, random.Random(seed), passages, chunk_tokens, 1 + continuation, per_document)
    found = tuple(passage for row in sorted(chosen) for passage in chosen[row])
    if len(found) < passages:
        raise InputError(
            f"the texts have room for {len(found)} held-out passages, not {passages}: a document gives one for every "
            f"{2 * (1 + continuation) * chunk_tokens} tokens it has, {per_document} at most; "
            "take more or longer texts, or ask for fewer passages"
        )
    splitter = Splitter(tokens.count_tokens, max_tokens=reference_tokens)
    unique: dict[str, Document] = {}
    for row, document in enumerate(documents):
        for rest in _without(document.text, chosen.get(row, [])):
            for piece in splitter.split(rest):
                if not one_word(piece.text):
                    unique.setdefault(piece.text, Document(document.source, piece.text))
    copied = overlapping(list(unique), [passage.text for passage in found], share)
    references = [document for document, copy in zip(unique.values(), copied, strict=True) if not copy]
    if not references:
        raise InputError("nothing of the texts is left to be remembered beside the held-out passages; take more texts")
    return Corpus(found, tuple(references), sum(copied), chunk_tokens)


def _choose(
    documents: Sequence[Document],
    tokens: Tokens,
    drawing: random.Random,
    wanted: int,
    chunk_tokens: int,
    chunks: int,
    per_document: int,
) -> dict[int, list[HeldOut]]:
    """At most ``wanted`` passages by their document's row, in the text's order; no second one while a first is left."""
    rows = list(range(len(documents)))
    drawing.shuffle(rows)
    chosen: dict[int, list[HeldOut]] = {}
    candidates: dict[int, Iterator[HeldOut]] = {}
    left = wanted
    for _ in range(per_document):
        for row in rows:
            if not left:
                break
            if row not in candidates:
                candidates[row] = _candidates(documents[row], tokens, drawing, chunk_tokens, chunks)
            passage = next(candidates[row], None)
            if passage is not None:
                chosen.setdefault(row, []).append(passage)
                left -= 1
    return {row: sorted(some, key=lambda passage: passage.start) for row, some in chosen.items()}


def _candidates(
    document: Document, tokens: Tokens, drawing: random.Random, chunk_tokens: int, chunks: int
) -> Iterator[HeldOut]:
    """Passages of a document that lie apart, in an order that was drawn."""
    pieces = tokens.cut(document.text, chunk_tokens)
    room = len(pieces) // (2 * chunks)  # at least half of a document remains
    starts = list(range(len(pieces) // 3, len(pieces) - chunks + 1))
    drawing.shuffle(starts)
    taken: list[int] = []
    for start in starts:
        if len(taken) == room:
            return
        if any(abs(start - other) < chunks for other in taken):
            continue
        part = pieces[start : start + chunks]
        if _stable(part, tokens, chunk_tokens):
            taken.append(start)
            yield HeldOut(document.source, sum(map(len, pieces[:start])), tuple(part))


def _stable(chunks: Sequence[str], tokens: Tokens, chunk_tokens: int) -> bool:
    """Whether the chunks have the same tokens, scored one by one and as one continuation.

    Not so if a character's tokens lie on both sides of a cut, and with some tokenizers where white space does.
    """
    scored = "".join(chunks[1:])
    return (
        all(tokens.count_tokens(chunk) == chunk_tokens for chunk in chunks)
        and tokens.count_tokens(scored) == chunk_tokens * (len(chunks) - 1)
        and tokens.cut(scored, chunk_tokens) == list(chunks[1:])
    )


def _without(text: str, passages: Sequence[HeldOut]) -> Iterator[str]:
    """The parts of a text before, between and after passages in its order."""
    start = 0
    for passage in passages:
        yield text[start : passage.start]
        start = passage.start + len(passage.text)
    yield text[start:]
