"""`hold_out`: passages that a model is scored on, and references from the rest of their documents."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from m3runtime.documents.document import Document
from m3runtime.documents.reading import one_word
from m3runtime.documents.splitting import Splitter
from m3runtime.errors import InputError
from m3runtime.lab.evaluation.overlapping import overlapping


class Tokens(Protocol):
    """The part of an `m3runtime.adapters.base.Adapter` that cutting texts needs."""

    def count_tokens(self, text: str) -> int:
        """The number of tokens; see `Adapter.count_tokens`."""

    def cut(self, text: str, tokens: int) -> list[str]:
        """Pieces of a number of tokens; see `Adapter.cut`."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A passage of a document that is in no reference."""

    source: str
    start: int
    """Offset in the document's text, in characters."""
    chunks: tuple[str, ...]
    """The prompt, then the scored chunks. Each has the same tokens alone as in its context."""

    @property
    def prompt(self) -> str:
        """The first chunk, which the model is given."""
        return self.chunks[0]

    @property
    def continuation(self) -> str:
        """The text that is scored."""
        return "".join(self.chunks[1:])

    @property
    def text(self) -> str:
        """The whole passage."""
        return "".join(self.chunks)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents, divided into passages to score and references to remember."""

    passages: tuple[HeldOut, ...]
    references: tuple[Document, ...]
    """Each fits one reference; equal texts occur once. ``source`` is the source of the original document."""
    dropped: int
    """Number of references that were left out because they share too much with a passage."""
    chunk_tokens: int
    """Tokens of each chunk of a passage."""


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
    least twice as long; a document gives ``per_document`` passages at most, and never more than half of itself. The
    documents and the seed determine the passages. References that share more than ``share`` with a passage
    (`m3runtime.documents.overlap.overlap`) are dropped.

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
                    unique.setdefault(piece.text, Document(document.name, piece.text))
    copied = overlapping(list(unique), [passage.text for passage in found], share)
    references = [document for document, copy in zip(unique.values(), copied, strict=True) if not copy]
    if not references:
        raise InputError("no text is left to remember apart from the held-out passages; take more texts")
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
    """At most ``wanted`` passages by row of the document, in text order; one from each document before any second."""
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
    """Passages of a document that do not overlap, in random order."""
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
            yield HeldOut(document.name, sum(map(len, pieces[:start])), tuple(part))


def _stable(chunks: Sequence[str], tokens: Tokens, chunk_tokens: int) -> bool:
    """True if the chunks have the same tokens one by one as in one continuation.

    They have not if a cut separates the tokens of one character, or with some tokenizers white space.
    """
    scored = "".join(chunks[1:])
    return (
        all(tokens.count_tokens(chunk) == chunk_tokens for chunk in chunks)
        and tokens.count_tokens(scored) == chunk_tokens * (len(chunks) - 1)
        and tokens.cut(scored, chunk_tokens) == list(chunks[1:])
    )


def _without(text: str, passages: Sequence[HeldOut]) -> Iterator[str]:
    """The parts of a text before, between and after passages, which are in text order."""
    start = 0
    for passage in passages:
        yield text[start : passage.start]
        start = passage.start + len(passage.text)
    yield text[start:]
