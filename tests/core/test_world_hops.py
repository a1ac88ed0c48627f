"""Questions of two references: neither answers by itself, and the first names whom the second is about."""

from itertools import pairwise

import pytest

from m3runtime.errors import InputError
from m3runtime.lab.evaluation.judging import is_right
from m3runtime.lab.evaluation.world_hops import make_hops


def test_a_question_takes_both_of_its_references() -> None:
    world = make_hops(3, references=160, questions=30)
    assert world == make_hops(3, references=160, questions=30)
    assert len(world.references) == len(set(world.references)) == 160
    assert len({question.text for question in world.questions}) == 30
    for question in world.questions:
        first, second = (world.references[number] for number in question.references)
        assert is_right(second, question.answers)
        assert not is_right(first, question.answers)
        # The person is named by the first, and by the question not at all.
        person = next(name for name in _names(second) if name in first)
        assert person not in question.text


def _names(text: str) -> list[str]:
    words = text.replace(".", " ").replace("'s", " ").replace(",", " ").split()
    return [f"{one} {two}" for one, two in pairwise(words) if one.istitle() and two.istitle()]


def test_more_questions_than_people_answer_are_refused() -> None:
    with pytest.raises(InputError, match="16 references give"):
        make_hops(3, references=16, questions=30)
