"""Judge answers: right or wrong, and invented or not."""

import re
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
