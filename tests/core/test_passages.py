"""Laws of held-out passages and the references beside them."""

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.documents.document import Document
from m3runtime.documents.overlap import overlap
from m3runtime.errors import InputError
from m3runtime.lab.evaluation.passages import Corpus, hold_out

CHUNK = 4
REFERENCE = 8


class Words:
    """Every word is a token, with the white space before it; a long word is two, one of which is nothing alone."""

    def count_tokens(self, text: str) -> int:
        return len(self._tokens(text))

    def cut(self, text: str, tokens: int) -> list[str]:
        found = self._tokens(text)
        pieces = ["".join(found[start : start + tokens]) for start in range(0, len(found), tokens)]
        assert "".join(pieces) == text
        return pieces

    def _tokens(self, text: str) -> list[str]:
        return re.findall(r"\s*\S+\s*\Z|\s*\S+|\s+", text)


class Whims(Words):
    """Counts another token in a text that begins with an ``a``: as tokenizers do that see what stands before."""

    def count_tokens(self, text: str) -> int:
        return super().count_tokens(text) + text.lstrip().startswith("a")


def prose(length: int, seed: int, vocabulary: int = 400) -> str:
    """Paragraphs of words that seldom come again."""
    found = [
        f"{'abcdefghij'[(seed * 31 + n * n * 7) % 10]}{(seed * 977 + n * 7919) % vocabulary}" for n in range(length)
    ]
    lines = [" ".join(found[start : start + 11]) for start in range(0, length, 11)]
    return "\n\n".join(lines)


def documents(*lengths: int, vocabulary: int = 400) -> list[Document]:
    return [Document(f"{row}.txt", prose(length, row, vocabulary)) for row, length in enumerate(lengths)]


def held_out(texts: Sequence[Document], tokens: Words | None = None, **settings: float) -> Corpus:
    options = {"passages": 2, "continuation": 2, "chunk_tokens": CHUNK, "reference_tokens": REFERENCE, **settings}
    return hold_out(texts, tokens or Words(), **options)  # type: ignore[arg-type]


LENGTHS = st.builds(lambda some, one: [*some, one], st.lists(st.integers(0, 120), max_size=4), st.integers(24, 120))
CORPORA = st.tuples(LENGTHS, st.integers(0, 20), st.sampled_from([30, 400]))


@given(given=CORPORA, share=st.sampled_from([0.4, 2 / 3, 0.9]))
def test_no_reference_overlaps_a_passage_beyond_the_share(given: tuple[list[int], int, int], share: float) -> None:
    lengths, seed, vocabulary = given
    texts = documents(*lengths, vocabulary=vocabulary)
    try:
        corpus = held_out(texts, passages=1, seed=seed, share=share)
    except InputError:
        assert vocabulary == 30, "only what is copied all over can leave nothing"
        return
    everything = held_out(texts, passages=1, seed=seed, share=1)
    assert corpus.passages == everything.passages
    overlaps = {
        reference: max(overlap(reference.text, passage.text) for passage in corpus.passages)
        for reference in everything.references
    }
    kept = [reference for reference, most in overlaps.items() if most <= share]
    assert list(corpus.references) == kept
    assert corpus.dropped == len(everything.references) - len(kept)


@given(given=CORPORA)
def test_documents_are_their_passages_and_references(given: tuple[list[int], int, int]) -> None:
    lengths, seed, _ = given
    texts = documents(*lengths)
    corpus = held_out(texts, passages=1, seed=seed, share=1)
    tokens = Words()
    for document in texts:
        rest = document.text
        for passage in reversed([one for one in corpus.passages if one.source == document.name]):
            assert document.text[passage.start :].startswith(passage.text)
            rest = rest[: passage.start] + " " + rest[passage.start + len(passage.text) :]
        references = [reference.text for reference in corpus.references if reference.source == document.name]
        # A single word is no reference: there may be one before the passage, one after it and one at the end.
        said, remembered = rest.split(), " ".join(references).split()
        assert [word for word in said if word in remembered] == remembered
        assert len(said) - len(remembered) <= 3
        assert all(tokens.count_tokens(text) <= REFERENCE for text in references)


@given(lengths=st.lists(st.integers(72, 120), min_size=1, max_size=4), seed=st.integers(0, 20))
@pytest.mark.parametrize("per_document", [1, 2])
def test_passages_lie_apart_and_leave_half_of_a_document(per_document: int, lengths: list[int], seed: int) -> None:
    texts = documents(*lengths)
    try:
        corpus = held_out(texts, passages=per_document * len(lengths), seed=seed, per_document=per_document)
    except InputError:
        assert per_document == 2, "the first may lie where no second one has room"
        return
    for document in texts:
        passages = [one for one in corpus.passages if one.source == document.name]
        assert len(passages) == per_document
        ends = 0
        for passage in passages:
            assert passage.start >= ends
            ends = passage.start + len(passage.text)
        assert 2 * sum(Words().count_tokens(passage.text) for passage in passages) <= len(document.text.split())
    for passage in corpus.passages:
        assert [Words().count_tokens(chunk) for chunk in passage.chunks] == [CHUNK] * 3
        assert (passage.prompt, passage.prompt + passage.continuation) == (passage.chunks[0], passage.text)


@given(seed=st.integers(0, 1000))
def test_a_seed_draws_the_same_and_another_seed_something_else(seed: int) -> None:
    texts = documents(40, 60, 80)
    assert held_out(texts, seed=seed) == held_out(texts, seed=seed)
    others = [held_out(texts, seed=other).passages for other in range(seed + 1, seed + 6)]
    assert any(other != held_out(texts, seed=seed).passages for other in others)


def test_a_document_gives_a_second_passage_only_when_none_has_a_first_to_give() -> None:
    texts = documents(100, 100, 100)
    for seed in range(10):
        corpus = held_out(texts, passages=3, seed=seed)
        assert [passage.source for passage in corpus.passages] == ["0.txt", "1.txt", "2.txt"]


def test_what_is_tokenized_otherwise_in_pieces_is_passed_over() -> None:
    texts = documents(200)
    plain = [held_out(texts, passages=1, seed=seed).passages[0] for seed in range(20)]
    assert any(chunk.lstrip().startswith("a") for passage in plain for chunk in passage.chunks)
    for seed in range(20):
        (passage,) = held_out(texts, Whims(), passages=1, seed=seed).passages
        assert not any(chunk.lstrip().startswith("a") for chunk in passage.chunks)


def test_equal_references_stand_once_and_a_copied_document_is_dropped() -> None:
    (text,) = documents(100)
    once, twice = held_out([text], passages=1), held_out([text, replace(text, source="copy")], passages=1)
    assert len({reference.text for reference in twice.references}) == len(twice.references)
    (passage,) = twice.passages
    assert twice.dropped > once.dropped
    assert not any(overlap(reference.text, passage.text) > 2 / 3 for reference in twice.references)


def test_too_little_text_says_how_much_is_needed() -> None:
    with pytest.raises(InputError, match=r"room for 1 held-out passages, not 2: .* every 24 tokens it has, 2 at most"):
        held_out(documents(30, 12))
    for seed in range(10):  # two passages would be more than half of 40 words
        with pytest.raises(InputError, match="room for 2 held-out passages, not 3"):
            held_out(documents(40, 40), passages=3, seed=seed)
    with pytest.raises(InputError, match="room for 0 held-out passages"):
        held_out([])
    copied = Document("a", " ".join(["one two three four"] * 10))
    with pytest.raises(InputError, match="no text is left to remember"):
        held_out([copied], passages=1)
