"""`overlapping`: which of many references stand in any of many texts."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from m3runtime.documents.overlap import longest_common, numbered, spelt
from m3runtime.documents.words import words


def overlapping(references: Sequence[str], texts: Sequence[str], share: float) -> list[bool]:
    """True for each reference whose `overlap` with any of the texts is more than ``share``.

    Takes memory for an integer for each text and each word that any text has.
    """
    split = [words(text) for text in texts]
    places = numbered(split)
    spelled = [spelt(text, places) for text in split]
    # How often each text has each word, int32[words, texts]: no common subsequence is longer than what word lists
    # have in common in any order, and that is counted for all texts at once.
    counts = np.zeros((len(places), len(texts)), np.int32)
    for column, text in enumerate(split):
        for word, count in Counter(text).items():
            counts[places[word], column] = count
    return [_is_in_any(words(reference), places, counts, spelled, share) for reference in references]


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
    own = spelt(reference, places)
    return any(longest_common(own, texts[i], above=allowed) > allowed for i in np.flatnonzero(most > allowed).tolist())
