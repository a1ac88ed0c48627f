"""Rerankers with one mistake each."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from m3runtime.testing.reranker import MakeReranker, RerankerContract
from tests.end_to_end.rerankers import SharedWords
from tests.testing.broken.suites import make_suites

Scores = npt.NDArray[np.float32]


class GivesShares(SharedWords):
    """Divides by the sum over all texts of the call."""

    def score(self, question: str, texts: Sequence[str]) -> Scores:
        scores = super().score(question, texts)
        return (scores / max(scores.sum(initial=0), 1)).astype(np.float32)


class SortsByLength(SharedWords):
    """Batches texts of like length, and forgets to put the scores back."""

    def score(self, question: str, texts: Sequence[str]) -> Scores:
        return super().score(question, sorted(texts, key=len))


class ReadsTheTextAlone(SharedWords):
    def score(self, question: str, texts: Sequence[str]) -> Scores:
        return super().score("the harbour lamp", texts)


class LeavesOutBlankTexts(SharedWords):
    def score(self, question: str, texts: Sequence[str]) -> Scores:
        return super().score(question, [text for text in texts if text.strip()])


class GivesItsOwnCache(SharedWords):
    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.known: dict[tuple[str, ...], Scores] = {}

    def score(self, question: str, texts: Sequence[str]) -> Scores:
        return self.known.setdefault((question, *texts), super().score(question, texts))


class HasNoNumberForABlankQuestion(SharedWords):
    def score(self, question: str, texts: Sequence[str]) -> Scores:
        scores = super().score(question, texts)
        return scores if question.strip() else np.full_like(scores, np.nan)


class IsTrainedWhileItReads(SharedWords):
    def score(self, question: str, texts: Sequence[str]) -> Scores:
        self.weight *= 1.01
        return super().score(question, texts)


class Rerankers(RerankerContract):
    kind: ClassVar[type[SharedWords]]

    @pytest.fixture(scope="class")
    @classmethod
    def make_reranker(cls) -> MakeReranker:
        return lambda: cls.kind("words")


BROKEN = SharedWords.__subclasses__()
globals().update(make_suites(Rerankers, __name__, SharedWords, BROKEN))
