"""The share of a reference that a text contains, so that a copied text does not count as remembered."""

from collections.abc import Mapping, Sequence

from rapidfuzz.distance import LCSseq

from m3runtime.documents.words import words

_NOWHERE = "\0"
"""Stands for the words of references that no text has: a text never holds it."""


def overlap(reference: str, text: str) -> float:
    """The share of a reference's words, in [0, 1], that a span of the text has in the same order.

    That is the longest common subsequence of words, ``|LCS| / |reference|``, in the best of all spans of
    ``2 |reference|`` words of the text. 0 for a reference without words.
    """
    wanted, there = words(reference), words(text)
    if not wanted:
        return 0.0
    numbers = numbered([there])
    return longest_common(spelt(wanted, numbers), spelt(there, numbers)) / len(wanted)


def numbered(texts: Sequence[Sequence[str]]) -> dict[str, int]:
    """Each word of the texts, numbered from 0."""
    return {word: place for place, word in enumerate(dict.fromkeys(word for text in texts for word in text))}


def spelt(text: Sequence[str], numbers: Mapping[str, int]) -> str:
    """Words as a string with one character for each, which rapidfuzz compares three times as fast as integers."""
    return "".join(chr(numbers[word] + 1) if word in numbers else _NOWHERE for word in text)


def longest_common(reference: str, text: str, above: int = 0) -> int:
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
