"""The share of a reference that a text contains, so that a copied text does not count as remembered."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from rapidfuzz.distance import LCSseq

# Chinese, Japanese, Thai and others write without spaces: there every character is a word.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_WORDS = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")
_NOWHERE = "\0"
"""Stands for the words of references that no text has: a text never holds it."""


def words(text: str) -> list[str]:
    """The words of a text in order, lower-cased and without punctuation."""
    return _WORDS.findall(text.lower())


def overlap(reference: str, text: str) -> float:
    """The share of a reference's words, in [0, 1], that a span of the text has in the same order.

    That is the longest common subsequence of words, ``|LCS| / |reference|``, in the best of all spans of
    ``2 |reference|`` words of the text. 0 for a reference without words.
    """
    wanted, there = words(reference), words(text)
    if not wanted:
        return 0.0
    places = _places([there])
    return _longest(_spelt(wanted, places), _spelt(there, places)) / len(wanted)


def overlapping(references: Sequence[str], texts: Sequence[str], share: float) -> list[bool]:
    """For each reference whether its `overlap` with any of the texts is more than ``share``.

    Takes memory for an integer for each text and each word that any text has.
    """
    split = [words(text) for text in texts]
    places = _places(split)
    spelt = [_spelt(text, places) for text in split]
    # How often each text has each word, int32[words, texts]: no common subsequence is longer than what word lists
    # have in common in any order, and that is counted for all texts at once.
    counts = np.zeros((len(places), len(texts)), np.int32)
    for column, text in enumerate(split):
        for word, count in Counter(text).items():
            counts[places[word], column] = count
    return [_is_in_any(words(reference), places, counts, spelt, share) for reference in references]


def _is_in_any(
    reference: Sequence[str], places: Mapping[str, int], counts: np.ndarray, texts: Sequence[str], share: float
) -> bool:
    length = len(reference)
    allowed = sum(found / length <= share for found in range(1, length + 1))
    common = {word: count for word, count in Counter(reference).items() if word in places}
    if sum(common.values()) <= allowed:
        return False
    times = np.fromiter(common.values(), np.int32, len(common))
    most = np.minimum(counts[[places[word] for word in common]], times[:, None]).sum(0)
    spelt = _spelt(reference, places)
    return any(_longest(spelt, texts[i], above=allowed) > allowed for i in np.flatnonzero(most > allowed).tolist())


def _places(texts: Sequence[Sequence[str]]) -> dict[str, int]:
    """Each word of the texts, numbered from 0."""
    return {word: place for place, word in enumerate(dict.fromkeys(word for text in texts for word in text))}


def _spelt(text: Sequence[str], places: Mapping[str, int]) -> str:
    """Words as a string with one character for each, which rapidfuzz compares three times as fast as integers."""
    return "".join(chr(places[word] + 1) if word in places else _NOWHERE for word in text)


def _longest(reference: str, text: str, above: int = 0) -> int:
    """The longest common subsequence with any span of ``2 |reference|`` of the text; ``above`` if none is longer.

    A span one further on has one element less and one more, so its subsequence is longer by one at most: spans that
    cannot exceed the longest so far are passed over, and the maximum is exact.
    """
    width = 2 * len(reference)
    longest, start = above, 0
    while start <= max(0, len(text) - width) and longest < len(reference):
        here = LCSseq.similarity(reference, text[start : start + width])
        longest = max(longest, here)
        start += longest - here + 1
    return longest
