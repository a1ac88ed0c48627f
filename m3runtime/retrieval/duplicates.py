"""`Duplicates`: finds references that say the same, so that they are recalled once."""

import re
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Mapping, Sequence

from m3runtime.retrieval.match import Match, References

_LEAST = 0.8
"""A reference stands for another one if the other has this share of its words."""
_KEPT = 8192
"""References whose sentences are kept, about 1 KB each."""

_LINE_MARK = re.compile(r"(?m)^[ \t]*(?:[-*+•>]|#{1,6})[ \t]+")  # of a list, a quotation or a heading
_END = re.compile(r"(?<=[.!?])\s+|(?<=\u3002)|\n\s*\n")  # U+3002 ends a sentence in Chinese and Japanese
_QUOTES = r"\"'\u2018\u2019\u201c-\u201e\u00ab\u00bb"
_EMPHASIS = re.compile(  # in pairs alone: f'(x), 5" and z* keep their sign
    rf"(?<!\S)(?:([*_`]+)(?=\w)([^*_`]*[\w.,!?])\1|[{_QUOTES}](?=\w)([^{_QUOTES}]*[\w.,!?])[{_QUOTES}])(?!\w)"
)
_AT_END = ".!?\u3002:;, "


class Duplicates:
    """Joins matches that say the same. Reads each text once, for an id never gets another one. Thread-safe.

    One reference stands for another if it has all sentences of it, and few more: lines, marks of emphasis and lists,
    case and the end of a sentence may differ, no word, number or sign within it. So a near miss is never taken for a
    duplicate, and nothing is lost that any of their texts says. Headings are not compared.
    """

    def __init__(self, references: References) -> None:
        self._references = references
        self._lock = threading.Lock()
        self._kept = OrderedDict[int, Mapping[int, int]]()

    def joined(self, matches: Sequence[Match], most: int) -> list[Match]:
        """The first ``most`` matches, best first, each with the ids that it stands for, among all that are given.

        Where a later match says more than an earlier one, it takes its place and its score.
        """
        said = self._sentences([match.id for match in matches])
        found: list[Match] = []
        for match in matches:
            mine = said[match.id]
            for place, one in enumerate(found):
                theirs = said[one.id]
                if _is_in(mine, theirs):
                    found[place] = Match(one.id, one.score, (*one.stands_for, match.id))
                    break
                if _is_in(theirs, mine):
                    found[place] = Match(match.id, one.score, (one.id, *one.stands_for))
                    break
            else:
                if len(found) < most:
                    found.append(match)
        return found

    def _sentences(self, ids: Sequence[int]) -> Mapping[int, Mapping[int, int]]:
        """The sentences of each, by their hashes, with their words. None are those of an id that is unknown."""
        with self._lock:
            found = {id: self._kept[id] for id in ids if id in self._kept}
            for id in found:
                self._kept.move_to_end(id)
        if missing := [id for id in ids if id not in found]:
            new = {id: sentences(one.text) for id, one in self._references(missing).items()}
            with self._lock:
                self._kept.update(new)
                while len(self._kept) > _KEPT:
                    self._kept.popitem(last=False)
            found |= {id: new.get(id, {}) for id in missing}
        return found


def sentences(text: str) -> dict[int, int]:
    """The hash of each sentence of a text, and its number of words. Lines, emphasis and case make no difference."""
    plain = _LINE_MARK.sub("", unicodedata.normalize("NFC", text))
    found: dict[int, int] = {}
    for sentence in _END.split(plain):
        words = _EMPHASIS.sub(_emphasised, sentence).casefold().rstrip(_AT_END).split()
        if words:
            found[hash(" ".join(words))] = len(words)
    return found


def _emphasised(found: re.Match[str]) -> str:
    return found[2] or found[3]


def _is_in(some: Mapping[int, int], all: Mapping[int, int]) -> bool:
    """Are these sentences among the others, and most of their words?"""
    return bool(some) and some.keys() <= all.keys() and sum(some.values()) >= _LEAST * sum(all.values())
