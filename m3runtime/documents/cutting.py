"""`LEVELS`: ways to cut a text into smaller spans, from lines to words, and `letters` for what has no words."""

import re
import unicodedata
from collections.abc import Callable, Iterator
from itertools import pairwise

from m3runtime.documents.text import UNSPACED

Span = tuple[int, int]
"""Start and end in a text, with no white space at either."""

_ITEM = re.compile(r"\s*(?:[-*+•|>#]|\d+[.)])\s")
# As in Unicode's rules, no sentence begins with a small letter.
_SENTENCE = re.compile(r"[.?!…]+[\"'”’»)\]]*\s+(?=[^\sa-z])|[。！？｡．]+[”’」』）)]*", re.DOTALL)  # noqa: RUF001
_CLAUSE = re.compile(r"[,;:–—]\s+|[、，；：､]", re.DOTALL)  # noqa: RUF001
_WORD = re.compile(rf"\s+|(?<=[{UNSPACED}])(?=[{UNSPACED}])")
_JOINER = "\u200d"


def stripped(text: str, start: int, end: int) -> Iterator[Span]:
    """The span without white space at its ends, if anything is left of it."""
    piece = text[start:end]
    if body := piece.strip():
        start += len(piece) - len(piece.lstrip())
        yield start, start + len(body)


def lines(text: str, span: Span) -> Iterator[Span]:
    """The lines, joined where a break is there only because its line was full.

    Such a break would part sentences. It is one if the next word would have made its line longer than the longest of
    the paragraph, unless an item of a list or a row of a table begins with that word.
    """
    start, end = span
    parts = text[start:end].split("\n")
    width = max(map(len, parts))
    place = start
    for line, following in pairwise(parts):
        place += len(line) + 1
        word = following.split(None, 1)[:1]
        if not word or len(line) + 1 + len(word[0]) <= width or _ITEM.match(following):
            yield from stripped(text, start, place)
            start = place
    yield from stripped(text, start, end)


def sentences(text: str, span: Span) -> Iterator[Span]:
    """The sentences."""
    return _cut(text, span, _SENTENCE)


def clauses(text: str, span: Span) -> Iterator[Span]:
    """The parts of sentences between commas, colons and dashes."""
    return _cut(text, span, _CLAUSE)


def words(text: str, span: Span) -> Iterator[Span]:
    """The words: what white space parts, and each character of a script without spaces."""
    return _cut(text, span, _WORD)


def letters(text: str, span: Span, size: int) -> Iterator[Span]:
    """Pieces of about ``size`` characters, so that accents and joined emoji of up to 16 characters stay whole."""
    start, end = span
    while end - start > size:
        middle = start + size
        places = (*range(middle, start, -1), *range(middle + 1, min(middle + 16, end)))
        place = next((place for place in places if _may_cut(text, place)), middle)
        yield from stripped(text, start, place)
        start = place
    yield from stripped(text, start, end)


LEVELS: tuple[Callable[[str, Span], Iterator[Span]], ...] = (lines, sentences, clauses, words)
"""From coarse to fine."""


def _cut(text: str, span: Span, ends: re.Pattern[str]) -> Iterator[Span]:
    start, end = span
    for found in ends.finditer(text, start, end):
        if found.end() > found.start() or _may_cut(text, found.end()):
            yield from stripped(text, start, found.end())
            start = found.end()
    yield from stripped(text, start, end)


def _may_cut(text: str, place: int) -> bool:
    """True if no character before ``place`` continues at it."""
    after = text[place]
    joined = after == _JOINER or text[place - 1] == _JOINER or "\U0001f3fb" <= after <= "\U0001f3ff"
    return not joined and not unicodedata.category(after).startswith("M")
