"""`words`: a text as words, alike in all that compares texts."""

import re

from m3runtime.documents.text import UNSPACED

_WORDS = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


def words(text: str) -> list[str]:
    """The words of a text in order, lower-cased and without punctuation."""
    return _WORDS.findall(text.lower())
