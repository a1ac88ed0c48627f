"""`Segment`: the words of some texts as arrays that never change."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from m3runtime.memory.block import Ids
from m3runtime.retrieval.bm25.words import words

Numbers = npt.NDArray[np.uint32]
_MOST = 255
"""Occurrences of a word in one text that are counted."""


@dataclass(frozen=True)
class Segment:
    """Texts by number, in the order of their ids; for each word the texts that have it, and how often."""

    ids: Ids
    lengths: Numbers
    """The words of each text."""
    terms: tuple[str, ...]
    """All words, in order."""
    starts: npt.NDArray[np.int64]
    """The place in ``texts`` at which those of each word start, and the end of the last."""
    texts: Numbers
    counts: npt.NDArray[np.uint8]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of each word."""
        return dict(zip(self.terms, range(len(self.terms)), strict=True))

    def span(self, term: str) -> slice:
        """The part of `texts` and `counts` that is a word's."""
        number = self.numbers.get(term)
        return slice(0, 0) if number is None else slice(int(self.starts[number]), int(self.starts[number + 1]))

    @classmethod
    def of(cls, ids: Ids, texts: Sequence[str]) -> "Segment":
        """The segment of texts, whose ids are ascending."""
        found: dict[str, int] = {}
        term, count, sizes, lengths = list[int](), list[int](), list[int](), list[int]()
        for one in texts:
            counted = Counter(words(one))
            lengths.append(counted.total())
            term += [found.setdefault(word, len(found)) for word in counted]
            sizes.append(len(counted))
            count += counted.values()
        first, ordered = list(found), sorted(found)
        rank = dict(zip(ordered, range(len(ordered)), strict=True))
        ranks = np.array([rank[word] for word in first], np.int64)
        text = np.repeat(np.arange(len(sizes)), sizes)
        counts = np.minimum(np.array(count, np.int64), _MOST)
        return _sorted(ids, np.array(lengths, np.uint32), ordered, ranks[np.array(term, np.int64)], text, counts)

    @classmethod
    def joined(cls, segments: Sequence["Segment"]) -> "Segment":
        """The segment of all texts of these, which have no id in common."""
        found = sorted(set().union(*(one.terms for one in segments)))
        numbers = dict(zip(found, range(len(found)), strict=True))
        terms, texts, first = [], [], 0
        for one in segments:
            own = np.array([numbers[word] for word in one.terms], np.int64)
            terms.append(np.repeat(own, np.diff(one.starts)))
            texts.append(one.texts.astype(np.int64) + first)
            first += len(one.ids)
        ids = np.concatenate([one.ids for one in segments])
        order = np.argsort(ids)
        place = np.empty_like(order)
        place[order] = np.arange(len(order))
        return _sorted(
            ids[order],
            np.concatenate([one.lengths for one in segments])[order],
            found,
            np.concatenate(terms),
            place[np.concatenate(texts)],
            np.concatenate([one.counts for one in segments]),
        )

    def without(self, ids: Ids) -> "Segment":
        """The same without the texts of some ids, and without the words that no other text has."""
        stays = ~np.isin(self.ids, ids)
        if stays.all():
            return self
        term = np.repeat(np.arange(len(self.terms)), np.diff(self.starts))
        kept = stays[self.texts]
        place = np.cumsum(stays) - 1
        lengths = self.lengths[stays]
        return _sorted(self.ids[stays], lengths, self.terms, term[kept], place[self.texts[kept]], self.counts[kept])


def _sorted(
    ids: Ids,
    lengths: Numbers,
    terms: Sequence[str],
    term: npt.NDArray[np.int64],
    text: npt.NDArray[np.integer],
    count: npt.NDArray[np.integer],
) -> Segment:
    """The segment of triples of word, text and count. Words that no text has are left out; ``terms`` are in order."""
    order = np.argsort(term * max(1, len(ids)) + text, kind="stable")  # linear where it is nearly in order
    sizes = np.bincount(term, minlength=len(terms))
    used = np.flatnonzero(sizes)
    return Segment(
        ids,
        lengths,
        tuple(terms) if len(used) == len(terms) else tuple(terms[number] for number in used.tolist()),
        np.concatenate([[0], np.cumsum(sizes[used])]).astype(np.int64),
        text[order].astype(np.uint32),
        count[order].astype(np.uint8),
    )
