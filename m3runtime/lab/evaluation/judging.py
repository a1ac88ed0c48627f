"""Judge answers: right or wrong, and invented or not."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_OWNS_UP = re.compile(
    r"(?:\b(?:not|never|no)|n['’]t)\b[^.]{0,40}\b(?:stated?|known?|knows|mention\w*|specif\w*|given|sure|say\w*|tell|told|"
    r"information|provided?|available|contain\w*|record\w*|clear|answer\w*|determin\w*)\b|\b(?:unknown|unclear|unspecified)\b",
    re.IGNORECASE,
)
"""Phrases that admit not knowing; English only."""


def is_right(text: str, accepted: Sequence[str]) -> bool:
    """True if an accepted answer occurs in the text as whole words, in upper or lower case."""
    return any(re.search(rf"(?<!\w){re.escape(one)}(?!\w)", text, re.IGNORECASE) for one in accepted)


def is_invented(text: str) -> bool:
    """True if a text claims to answer a question without an answer: it is not blank and does not admit not knowing."""
    return bool(text.strip()) and not _OWNS_UP.search(text)


def is_exact(text: str, accepted: Sequence[str]) -> bool:
    """True if a text is an accepted answer, as SQuAD compares them: see `words`."""
    return any(words(text) == words(one) for one in accepted)


def f1(text: str, accepted: Sequence[str]) -> float:
    """The F1 of a text's words against those of the accepted answer that it is nearest to, as in SQuAD; 0 to 1."""
    return max((_f1(words(text), words(one)) for one in accepted), default=0.0)


def words(text: str) -> list[str]:
    """The words of an answer in lower case, without punctuation and English articles."""
    bare = text.lower().translate(str.maketrans("", "", string.punctuation))
    return [word for word in bare.split() if word not in ("a", "an", "the")]


def _f1(ours: Sequence[str], theirs: Sequence[str]) -> float:
    common = (Counter(ours) & Counter(theirs)).total()
    if not common:
        return float(ours == theirs)
    return 2 * common / (len(ours) + len(theirs))
