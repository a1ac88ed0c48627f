"""Statements from references: laws, and what they are of sentences that one would write."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from m3runtime.lab.evaluation.statements import holds, make_statement, sentences

WORDS = st.sampled_from(
    ["the", "lamp", "harbour", "Uskerfold", "burns", "1431", "oil,", "(walnut)", '"Perpetua"', "it", "keepers",
     "12,000", "Ärger", "straße", "灯塔", "don't", "I", "e.g.", "x=1", "**bold**"]
)  # fmt: skip
ENDS = st.sampled_from([". ", "? ", "\n\n", ".\n", "!\u201d ", "\n- ", " ", "\n"])
TEXTS = st.lists(
    st.tuples(st.lists(WORDS, min_size=1, max_size=12).map(" ".join), ENDS).map("".join), min_size=1, max_size=6
).map("".join) | st.text(max_size=200)


@given(TEXTS, st.integers(0, 2**40), st.integers(0, 9))
def test_a_statement_is_the_beginning_of_a_sentence_of_its_reference(text: str, id: int, seed: int) -> None:
    statement = make_statement(id, text, seed)
    if statement is None:
        return
    assert statement.reference == id
    assert any(sentence.startswith(statement.prompt + statement.answer) for sentence in sentences(text))
    assert holds(text, statement)
    assert len(statement.prompt.split()) >= 3  # four words, of which brackets may join two
    assert statement.answer.strip()
    assert statement.answer.strip().casefold() not in statement.prompt.casefold().split()
    assert not statement.prompt.endswith(" ")
    assert make_statement(id, text, seed) == statement


@given(TEXTS)
def test_sentences_are_all_of_the_text_but_white_space_and_what_closes_them(text: str) -> None:
    def letters(of: str) -> str:
        return "".join(letter for letter in of if letter.isalnum())

    assert letters("".join(sentences(text))) == letters(text)


@pytest.mark.parametrize(
    ("text", "prompt", "answer"),
    [
        ("The harbour lamp of Brindolvar was first lit in 1868 by hand.",
         "The harbour lamp of Brindolvar was first lit in", " 1868"),
        ("The captain of the ferry is named Wilmet Draskin.", "The captain of the ferry is named", " Wilmet Draskin"),
        ("Wer den Hafen betritt, der sieht zuerst den Leuchtturm.", "Wer den Hafen betritt, der sieht zuerst den",
         " Leuchtturm"),
        ("An old northern wall\nwas built (1431) of stone.", "An old northern wall was built (", "1431"),
        ("most keepers trim a harbour lamp at dusk", "most keepers trim a harbour lamp at", " dusk"),
        ("the keepers trim every lamp for it", "the keepers trim every lamp", " for it"),
        ("Changed in version 3: Previously loops were different things.",
         "Changed in version 3: Previously loops were different", " things"),
    ],
)  # fmt: skip
def test_a_statement_breaks_off_before_what_it_tells(text: str, prompt: str, answer: str) -> None:
    statement = make_statement(0, text)
    assert statement
    assert (statement.prompt, statement.answer) == (prompt, answer)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Too short.",
        "港のランプはくるみ油を燃やし、夕暮れに番人が芯を切る。灯台は1431年に建てられた。",
        "it is as it was",
        "The lamp of Uskerfold shines over old Uskerfold",  # which says it already
        "| a | b | c | d | e | f | g | harbour |",
        "word " * 80,
    ],
)
def test_nothing_is_made_of_what_tells_nothing(text: str) -> None:
    assert make_statement(0, text) is None


def test_numbers_and_names_go_before_other_words() -> None:
    text = "The keepers trim every lamp at dusk. The lamp of the harbour is named Grey Marrow. Keepers like their work."
    assert {make_statement(0, text, seed).answer for seed in range(12)} == {" Grey Marrow"}  # type: ignore[union-attr]


def test_any_sentence_that_will_do_may_be_drawn() -> None:
    text = "The harbour keepers trim the lamp at six o'clock daily. The northern wall was built back in 1431."
    text += " The harbour lamp was first lit in 1868."
    assert {make_statement(0, text, seed).answer for seed in range(40)} == {" 1431", " 1868"}  # type: ignore[union-attr]


def test_another_reference_may_say_the_same() -> None:
    statement = make_statement(3, "The captain of the ferry is named Wilmet Draskin.")
    assert statement
    assert holds("All know it.\nThe captain of the\nferry is named Wilmet Draskin, and she is old.", statement)
    assert not holds("The captain of the ferry is Wilmet Draskin.", statement)
