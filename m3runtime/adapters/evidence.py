"""`evidence`: how far the memory that an answer was read from bears the answer out.

Attention alone does not tell an answer that was read from one that was made up: it looks for what was asked everywhere.
But the memory that it read most has words. An answer is doubtful if no memory stands out, if a name of the question is
not in that memory, or if the answer's own words are not. No model runs for it.
"""

import re

from m3runtime.adapters.grounding import Grounding
from m3runtime.documents.names import names
from m3runtime.documents.text import UNSPACED
from m3runtime.documents.words import words

_SHORT = re.compile(rf"[^\W\d{UNSPACED}]{{1,3}}")
"""Words that are mostly particles, in scripts with spaces."""


def evidence(question: str, answer: str, grounding: Grounding, leading: str | None) -> float:
    """The evidence of an answer, in [0, 1]; 0 if nothing was read.

    It is the `lead` of the memory that was read most, times the share of the question's names that its text has, times
    the mean of 1 and the share of the answer's own words that it has. ``leading`` is that text, with its headings.
    Own words are not in the question.
    """
    if leading is None:
        return 0.0
    there = set(words(leading))
    named = _share(names(question), there, none=1.0)
    return grounding.lead * named * (1 + _share(_own_words(question, answer), there, none=0.0)) / 2


def _own_words(question: str, answer: str) -> set[str]:
    """The answer's words that the question does not have: long ones, else short ones, else all of the answer's."""
    said = set(words(answer))
    own = said - set(words(question))
    return {word for word in own if not _SHORT.fullmatch(word)} or own or said


def _share(some: set[str], there: set[str], *, none: float) -> float:
    return len(some & there) / len(some) if some else none
