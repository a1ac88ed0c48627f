"""`outline`: the headings of a text, and the path of headings above each piece between them."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from m3runtime.documents.paragraphs import Paragraph

_HASHES = re.compile(r" {0,3}(#{1,6})[^\S\n]+(.*?)(?:\s+#+)?\s*")
_RULE = re.compile(r"([=~^\"'`*+#:.<>_-])\1{2,}")
_FENCE = re.compile(r"\s*(`{3,}|~{3,})")
_ITEM = re.compile(r"(?:[-*+•|>#]|\d+[.)]|\.\.)(?:\s|$)")
_INDENTED = re.compile(r"(?:\t| [ \t])\s*\S")
_NO_HEADWORD = (",", ":", ";", "{", "[", "(", "\\", "|")
_SENTENCE_END = (".", "!", "?")
_LONGEST_TITLE = 80
"""Characters of a title that a path keeps, and of the longest headword."""
_ENTRY = 100
"""The level of headwords: below all headings."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A heading, or lines of text below one."""

    start: int
    """Offset in the whole text."""
    text: str
    """Its lines without white space at the end."""
    gap: str
    """The white space between the piece before and this one."""
    path: tuple[str, ...]
    """The titles of the headings above it; those of a heading end with its own."""
    is_heading: bool
    begins: bool
    """True for the first piece of a section: a heading, or the text that follows a dictionary's entry."""
    in_fence: bool
    """True for code between fences of three backquotes or tildes."""


def outline(paragraphs: Iterable[Paragraph]) -> Iterator[Piece]:
    """The pieces of consecutive paragraphs.

    Headings are Markdown's ``#``; a line with at least three equal marks below it or around it, as reStructuredText and
    Markdown have them; and the headwords of a dictionary, short lines at the margin whose definition is indented below
    them. Levels of underlined headings are in the order in which their marks first occur.
    """
    walk, before = _Walk(), None
    for paragraph in paragraphs:
        if before:
            yield from walk.pieces(before, paragraph.text)
        before = paragraph
    if before:
        yield from walk.pieces(before, "")


class _Walk:
    """The headings above the present place, the styles of underlining seen so far, and the open fence."""

    def __init__(self) -> None:
        self._above: list[tuple[int, str]] = []  # levels and titles
        self._styles: list[str] = []
        self._fence = ""

    def pieces(self, paragraph: Paragraph, following: str) -> Iterator[Piece]:
        """The pieces of a paragraph; ``following`` is the text of the next one."""
        lines = paragraph.text.split("\n")
        begins = False
        if self._above and self._above[-1][0] == _ENTRY and not (self._fence or lines[0][0].isspace()):
            self._above.pop()
            begins = True
        start, gap, first = paragraph.start, paragraph.gap, 0
        while first < len(lines):
            in_fence = bool(self._fence) or bool(_FENCE.match(lines[first]))
            last, heading = self._next(lines, first, following)
            if heading:
                while self._above and self._above[-1][0] >= heading[0]:
                    self._above.pop()
                self._above.append(heading)
            whole = "\n".join(lines[first:last])
            text = whole.rstrip()
            path = tuple(title for _, title in self._above)
            yield Piece(start, text, gap, path, bool(heading), bool(heading) or begins, in_fence and not heading)
            start, gap, first, begins = start + len(whole) + 1, whole[len(text) :] + "\n", last, False

    def _next(self, lines: list[str], first: int, following: str) -> tuple[int, tuple[int, str] | None]:
        """The end of the piece that begins with line ``first``; its level and title if it is a heading."""
        if not self._fence and (found := self._heading(lines, first, following)):
            return found
        last = first
        while last < len(lines):
            line = lines[last]
            if self._fence:
                if line.strip().startswith(self._fence) and not line.strip(" \t" + self._fence[0]):
                    self._fence = ""
            elif fence := _FENCE.match(line):
                self._fence = fence[1]
            elif last > first and _hashes(lines, last):
                break
            last += 1
        return last, None

    def _heading(self, lines: list[str], first: int, following: str) -> tuple[int, tuple[int, str]] | None:
        """The end, level and title of the heading that begins with line ``first``, or None."""
        line, rest = lines[first].rstrip(), lines[first + 1 :]
        if hashes := _hashes(lines, first):
            return first + 1, (len(hashes[1]), _title(hashes[2]))
        if _RULE.fullmatch(line):
            if len(rest) > 1 and rest[1].rstrip() == line:
                return first + 3, (self._level(line[0] * 2), _title(rest[0]))
        elif rest and _RULE.fullmatch(rule := rest[0].rstrip()) and _may_be_underlined(line, rule):
            return first + 2, (self._level(rule[0]), _title(line))
        if not first and _may_be_headword(line) and all(map(_INDENTED.match, rest or [following])):
            return 1, (_ENTRY, _title(line))
        return None

    def _level(self, style: str) -> int:
        if style not in self._styles:
            self._styles.append(style)
        return self._styles.index(style) + 1


def _hashes(lines: list[str], place: int) -> re.Match[str] | None:
    """The match of a Markdown heading; lines of hashes below each other are a comment in code."""
    found = _HASHES.fullmatch(lines[place])
    around = lines[max(0, place - 1) : place] + lines[place + 1 : place + 2]
    return None if found and any(map(_comment(found[1]).fullmatch, around)) else found


def _comment(hashes: str) -> re.Pattern[str]:
    return re.compile(rf" {{0,3}}{hashes}(?:[^\S\n].*)?")


def _may_be_underlined(line: str, rule: str) -> bool:
    return not _ITEM.match(line) and (rule[0] in "=-~" or len(rule) >= len(line.strip()))


def _may_be_headword(line: str) -> bool:
    return not (
        line[:1].isspace()
        or len(line) > _LONGEST_TITLE
        or _ITEM.match(line)
        or line.endswith(_NO_HEADWORD)
        or (line.endswith(_SENTENCE_END) and " " in line)
    )


def _title(line: str) -> str:
    title = " ".join(line.split())
    return title if len(title) <= _LONGEST_TITLE else title[: _LONGEST_TITLE - 1].rstrip() + "…"
