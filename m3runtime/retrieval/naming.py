"""`Naming`: lowers the scores of texts that lack what a question names.

Embeddings know what a text is about, and hardly tell two names apart: a question about one bridge is near to what is
said of the next one. The words of the few nearest texts tell.
"""

from collections.abc import Sequence
from dataclasses import replace

from m3runtime.documents.names import names
from m3runtime.documents.words import words
from m3runtime.retrieval.match import Match, References

CANDIDATES = 20
"""Least number of matches that are looked at."""


class Naming:
    """Scores matches anew. Reads the texts of those it looks at each time. Thread-safe."""

    def __init__(self, references: References, weight: float) -> None:
        self._references = references
        self._weight = weight

    def scored(self, question: str, matches: Sequence[Match]) -> list[Match]:
        """The matches, best first: each loses the weight, times the share of the question's names that it lacks.

        Headings count. The scores of matches that nobody remembers any more stay.
        """
        named = names(question)
        if not named:
            return list(matches)
        texts = {id: one.headed for id, one in self._references([match.id for match in matches]).items()}
        lacking = {id: len(named - set(words(text))) / len(named) for id, text in texts.items()}
        lowered = (
            replace(match, score=max(-1.0, match.score - self._weight * lacking.get(match.id, 0.0)))
            for match in matches
        )
        return sorted(lowered, key=lambda match: -match.score)
