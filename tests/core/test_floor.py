"""Floors for the score of the nearest text, and how well that score tells what can be answered."""

import numpy as np
import pytest

from m3runtime.lab.evaluation.corpora import facts
from m3runtime.lab.evaluation.floor import LOST, Nearest, own_questions


def test_the_area_is_the_chance_to_score_higher() -> None:
    low, high = np.float32([0.1, 0.2]), np.float32([0.2, 0.9])
    assert Nearest(high, low, low).area == pytest.approx(7 / 8)
    assert Nearest(low, high, low).area == pytest.approx(1 / 8)
    assert Nearest(low, low, low).area == 0.5


def test_a_floor_declines_as_many_as_it_may() -> None:
    drawing = np.random.default_rng(0)
    scores = [drawing.random(200, np.float32) for _ in range(3)]
    floors = Nearest(*scores).floors(0.3)
    assert floors["recall.min_score"] == 0.3
    assert np.mean(scores[2] < floors["by its own texts"]) == pytest.approx(LOST, abs=0.005)
    assert np.mean(scores[0] < floors["by labelled questions"]) == pytest.approx(LOST, abs=0.005)


def test_own_questions_are_words_of_a_text() -> None:
    texts = facts(3, 10).texts
    made = own_questions(texts, 0)
    assert made == own_questions(texts, 0) != own_questions(texts, 1)
    assert len(made) == len(texts)
    assert all(len(question.split()) <= 10 for question in made)
    assert own_questions(["one", ""], 0) in (["one", ""], ["", "one"])


def test_facts_have_questions_that_no_text_answers() -> None:
    corpus = facts(3, 10)
    assert len(corpus.unanswerable) == 10
    assert not set(corpus.unanswerable) & {question for question, _ in corpus.questions}
