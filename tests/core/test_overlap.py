"""Laws of the overlap between references and texts."""

from collections.abc import Sequence
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.documents.overlap import overlap
from m3runtime.documents.words import words
from m3runtime.lab.evaluation.overlapping import overlapping

FEW_WORDS = st.lists(st.sampled_from("abcd"), max_size=14)
SOME_WORDS = FEW_WORDS.filter(bool)


def by_definition(reference: Sequence[str], text: Sequence[str]) -> float:
    """Every span of twice the reference's words, and the textbook's recursion in each."""

    @cache
    def common(a: tuple[str, ...], b: tuple[str, ...]) -> int:
        if not a or not b:
            return 0
        if a[0] == b[0]:
            return 1 + common(a[1:], b[1:])
        return max(common(a[1:], b), common(a, b[1:]))

    width = 2 * len(reference)
    spans = [tuple(text[start : start + width]) for start in range(max(1, len(text) - width + 1))]
    return max(common(tuple(reference), span) for span in spans) / len(reference)


@given(reference=st.lists(st.sampled_from("abcd"), min_size=1, max_size=5), text=FEW_WORDS)
def test_it_is_what_its_definition_says(reference: list[str], text: list[str]) -> None:
    assert overlap(" ".join(reference), " ".join(text)) == by_definition(reference, text)


@given(text=SOME_WORDS, before=FEW_WORDS, after=FEW_WORDS)
def test_a_text_overlaps_wholly_with_itself_wherever_it_stands(
    text: list[str], before: list[str], after: list[str]
) -> None:
    assert overlap(" ".join(text), " ".join(text)) == 1
    assert overlap(" ".join(text), " ".join([*before, *text, *after])) == 1


@given(reference=SOME_WORDS, text=st.lists(st.sampled_from("efgh"), max_size=14))
def test_disjoint_words_do_not_overlap(reference: list[str], text: list[str]) -> None:
    assert overlap(" ".join(reference), " ".join(text)) == 0


@given(reference=SOME_WORDS, text=SOME_WORDS, data=st.data())
def test_a_text_without_one_of_its_words_overlaps_no_more(
    reference: list[str], text: list[str], data: st.DataObject
) -> None:
    # A word out of the middle of a longer text may bring two halves into one span: there only the ends count.
    ends = [0, len(text) - 1]
    place = data.draw(st.sampled_from(range(len(text)) if len(text) <= 2 * len(reference) else ends))
    less = text[:place] + text[place + 1 :]
    assert overlap(" ".join(reference), " ".join(less)) <= overlap(" ".join(reference), " ".join(text))


@given(
    references=st.lists(FEW_WORDS, max_size=5),
    texts=st.lists(FEW_WORDS, max_size=4),
    share=st.sampled_from([0, 1 / 3, 0.5, 2 / 3, 0.9, 1]),
)
def test_many_at_once_are_as_each_alone(references: list[list[str]], texts: list[list[str]], share: float) -> None:
    joined = [" ".join(reference) for reference in references], [" ".join(text) for text in texts]
    expected = [any(overlap(reference, text) > share for text in joined[1]) for reference in joined[0]]
    assert overlapping(*joined, share) == expected


@given(text=SOME_WORDS, extra=SOME_WORDS)
def test_no_overlap_is_more_than_all(text: list[str], extra: list[str]) -> None:
    assert overlapping([" ".join(text)], [" ".join([*text, *extra])], 1) == [False]


@given(text=st.text())
def test_any_text_has_words_or_does_not_overlap(text: str) -> None:
    assert overlap(text, text) == bool(words(text))
    assert overlap(text, text.lower()) == bool(words(text))


def test_words_are_counted_in_order_and_within_a_span() -> None:
    reference = "The keeper trims the lamp."
    assert overlap(reference, "At dusk THE KEEPER -- trims the lamp; then he sleeps.") == 1
    assert overlap(reference, "lamp the trims keeper the") == 3 / 5
    apart = "the keeper " + "x " * 20 + "trims the lamp"
    assert overlap(reference, apart) == 3 / 5, "both halves, but too far apart"


@pytest.mark.parametrize(("text", "count"), [("don't stop", 3), ("東京の鷺", 4), ("a東b", 3), ("...", 0), ("x_1", 1)])
def test_words(text: str, count: int) -> None:
    assert len(words(text)) == count
