"""`RerankerContract`: the laws of every `Reranker`."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from m3runtime.retrieval.reranker import Reranker

MakeReranker = Callable[[], Reranker]
"""Makes a reranker: always an equal one, loaded anew."""

QUESTIONS = ("What does the harbour lamp burn?", "When does the ferry sail to Uskerfold?", "燃料は何ですか?")
TEXTS = (
    "The harbour lamp burns walnut oil.",
    "The ferry sails to Uskerfold on every day but Tuesday.",
    "",
    " \n\t ",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. 東京都 😀",
    "A text of many words. " * 400,
    "The bakery sells a flat bread with caraway for two pellins.",
)


class RerankerContract:
    """Laws of `Reranker`. A subclass has a fixture ``make_reranker`` of scope ``class``.

    ::

        class TestMine(RerankerContract):
            @pytest.fixture(scope="class")
            @staticmethod
            def make_reranker() -> MakeReranker:
                return lambda: MyReranker("path")
    """

    tolerance = 1e-5
    """The tolerance for the score of a text when other texts are scored in the same call."""

    @pytest.fixture(scope="class")
    @staticmethod
    def reranker(make_reranker: MakeReranker) -> Reranker:
        """One reranker for all tests of a class: making one may take seconds."""
        return make_reranker()

    def test_each_text_has_a_finite_score(self, reranker: Reranker) -> None:
        for question in (*QUESTIONS, "", "word " * 2000):
            scores = reranker.score(question, TEXTS)
            assert scores.dtype == np.float32
            assert scores.shape == (len(TEXTS),)
            assert np.isfinite(scores).all()

    def test_no_texts_have_no_scores(self, reranker: Reranker) -> None:
        scores = reranker.score(QUESTIONS[0], [])
        assert scores.dtype == np.float32
        assert scores.shape == (0,)

    def test_a_score_depends_on_no_other_text(self, reranker: Reranker) -> None:
        together = reranker.score(QUESTIONS[0], TEXTS)
        backwards = reranker.score(QUESTIONS[0], TEXTS[::-1])[::-1]
        alone = np.concatenate([reranker.score(QUESTIONS[0], [text]) for text in TEXTS])
        assert backwards == pytest.approx(together, abs=self.tolerance)
        assert alone == pytest.approx(together, abs=self.tolerance)

    def test_it_reads_the_question(self, reranker: Reranker) -> None:
        """The order of texts is not the same for all questions, or at least their distance."""
        first, second = (reranker.score(question, TEXTS) for question in QUESTIONS[:2])
        assert np.abs((first - first[0]) - (second - second[0])).max() > self.tolerance

    def test_equal_texts_have_equal_scores_at_any_time(self, reranker: Reranker, make_reranker: MakeReranker) -> None:
        first = reranker.score(QUESTIONS[1], TEXTS)
        first_copy = first.copy()
        reranker.score(QUESTIONS[0], TEXTS[:3])
        first[:] = 0  # the caller's own
        assert np.array_equal(reranker.score(QUESTIONS[1], TEXTS), first_copy)
        assert np.array_equal(make_reranker().score(QUESTIONS[1], TEXTS), first_copy)

    def test_threads_get_their_own_scores(self, reranker: Reranker) -> None:
        tasks = [(question, list(TEXTS[start:])) for question in QUESTIONS for start in range(3)] * 2
        expected = [reranker.score(*task) for task in tasks]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(lambda task: reranker.score(*task), tasks))
        for one, other in zip(found, expected, strict=True):
            assert one == pytest.approx(other, abs=self.tolerance)
