"""`paragraphs`: a text that comes in blocks, as the paragraphs between its blank lines."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")


@dataclass(frozen=True, slots=True)
class Paragraph:
    """Lines with no blank one between them."""

    start: int
    """Offset of its first line in the whole text."""
    text: str
    """Its lines with the indentation of the first, without white space at the end."""
    gap: str
    """The white space between the paragraph before and this one."""


def paragraphs(blocks: Iterable[str], longest: int) -> Iterator[Paragraph]:
    """The paragraphs of a text that comes in blocks: the same ones wherever the text is cut into blocks.

    Keeps ``longest`` characters and a block in memory. A longer paragraph is cut after a line, a word, or anywhere.
    """
    gap = ""
    for offset, part in _parts(blocks, longest):
        begin = 0
        for blank in (*_BLANK_LINES.finditer(part), None):
            end, after = (blank.start(), blank.end()) if blank else (len(part), len(part))
            lines = part[begin:end]
            stop = len(lines.rstrip())
            if stop:
                start = lines.rfind("\n", 0, len(lines) - len(lines.lstrip())) + 1
                yield Paragraph(offset + begin + start, lines[start:stop], gap + lines[:start])
                gap = lines[stop:] + part[end:after]
            else:
                gap += part[begin:after]
            begin = after


def _parts(blocks: Iterable[str], longest: int) -> Iterator[tuple[int, str]]:
    """The text in parts of at most ``longest`` characters that end with a paragraph, with their offsets.

    The end of a part depends on the text from its start on alone, so the blocks leave no trace.
    """
    rest, offset = "", 0
    for block in blocks:
        rest += block
        done = 0
        while len(rest) - done > longest:
            end = _end(rest, done, done + longest)
            yield offset + done, rest[done:end]
            done = end
        rest, offset = rest[done:], offset + done
    yield offset, rest


def _end(text: str, start: int, stop: int) -> int:
    """The last place to cut ``text[start:stop]``: after a paragraph, else after a line, a word, or anywhere."""
    blank = start
    for found in _BLANK_LINES.finditer(text, start, stop):
        if text[start : found.start()].strip():
            blank = found.end()
    if blank > start:
        return blank
    for mark in ("\n", " "):
        if (place := text.rfind(mark, start, stop)) > start:
            return place + 1
    return stop
