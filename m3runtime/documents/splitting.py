"""`Splitter`: cuts a text into passages that fit a reference."""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

from m3runtime.documents.reference import Place, Reference
from m3runtime.errors import ConfigError, InputError

CountTokens = Callable[[str], int]
"""Counts the tokens that a text has to the model, without special tokens."""

_BLANK_LINE = re.compile(r"(\n[^\S\n]*\n)")
_HEADING = re.compile(
    r"#{1,6}\s[^\n]*"  # markdown's
    r"|[^\n]+\n[^\S\n]*([=~^\"'`*+#:.<>_-])\1{2,}"  # underlined, as reStructuredText has it too
)
_ITEM = re.compile(r"\s*(?:[-*+•|>#]|\d+[.)])\s")
# White space that no text is likely to have, to stand for a line break that is only where a line was full.
_SOFT_BREAKS = "\u205f\u2004\u2005\u2006\u2008\u2009\u200a"

_Span = tuple[int, int]
_Piece = tuple[int, int, int]
"""A span and its tokens."""


class Splitter:
    """Splits texts at paragraphs, lines, sentences, words and characters, in this order of preference.

    No passage has more than ``max_tokens`` tokens, and nothing but white space lies between passages. A new
    paragraph begins a new passage, so that a memory is about one thing. A heading, or a paragraph that ends in a
    colon, goes with what follows as far as that fits.

    ``count_tokens`` is the model's own, ``len(tokenizer(text, add_special_tokens=False).input_ids)``. As
    thread-safe as that is. At most ``longest`` characters are split at once: a paragraph that is longer with its
    headings is cut at a line end first. Raises `ConfigError` if ``max_tokens`` is not at least 1.
    """

    def __init__(self, count_tokens: CountTokens, *, max_tokens: int = 128, longest: int = 1 << 20) -> None:
        if max_tokens < 1:
            raise ConfigError(f"reference_tokens must be at least 1, not {max_tokens}")
        self.count_tokens = count_tokens
        self.max_tokens = max_tokens
        self.longest = longest

    def split(self, text: str, source: str = "") -> list[Reference]:
        """The passages of a text from ``source``, in order; a blank text has none.

        Raises `InputError` if ``text`` is not valid Unicode, or if one character alone has more than
        ``max_tokens`` tokens.
        """
        return list(self.stream([text], source))

    def stream(self, blocks: Iterable[str], source: str = "") -> Iterator[Reference]:
        """The passages of a text that comes in blocks, cut anywhere: the same as `split` gives for all of it.

        Keeps ``longest`` characters and a block in memory. Raises what `split` does, when it comes to that place.
        """
        rest, offset = "", 0
        for block in blocks:
            rest += block
            done = 0
            while len(rest) - done > self.longest:
                end = _section_end(rest, done, done + self.longest)
                yield from self._passages(rest[done:end], offset + done, source)
                done = end
            rest, offset = rest[done:], offset + done
        yield from self._passages(rest, offset, source)

    def _passages(self, text: str, offset: int, source: str) -> Iterator[Reference]:
        """The passages of a part of a text that begins at ``offset``."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            place = offset + error.start
            raise InputError(f"character {place} of the text is half a character (a lone surrogate)") from error
        for start, end, tokens in self._by_paragraph(text):
            yield Reference(text[start:end], tokens, places=(Place(source, offset + start, offset + end),))

    def _by_paragraph(self, text: str) -> Iterator[_Piece]:
        heading: _Span | None = None
        for paragraph in _paragraphs(text):
            if _is_heading(text, paragraph):
                if heading and 2 * self._count(text, heading[0], paragraph[1]) > self.max_tokens:
                    yield from self._pieces(text, heading, self.max_tokens)
                    heading = None
                heading = (heading or paragraph)[0], paragraph[1]
            else:
                yield from self._section(text, heading, paragraph)
                heading = None
        if heading:
            yield from self._pieces(text, heading, self.max_tokens)

    def _section(self, text: str, heading: _Span | None, paragraph: _Span) -> Iterator[_Piece]:
        """A paragraph behind its heading."""
        start, end = paragraph
        if heading:
            if (together := self._count(text, heading[0], end)) <= self.max_tokens:
                yield heading[0], end, together
                return
            room = self.max_tokens - self._count(text, heading[0], start)
            # A heading that takes up half a passage would leave room for a shred of the paragraph only.
            first = next(self._pieces(text, paragraph, room), None) if 2 * room >= self.max_tokens else None
            if first and (together := self._count(text, heading[0], first[1])) <= self.max_tokens:
                yield heading[0], first[1], together
                start = first[1]
            else:
                yield from self._pieces(text, heading, self.max_tokens)
        yield from self._pieces(text, (start, end), self.max_tokens)

    def _pieces(self, text: str, span: _Span, limit: int) -> Iterator[_Piece]:
        """Pieces of at most ``limit`` tokens that hold all of a span but white space."""
        span = _stripped(text, span)
        if span[0] == span[1]:
            return
        if (tokens := self._count(text, *span)) <= limit:
            yield *span, tokens
            return
        from semantic_text_splitter import TextSplitter

        shown, soft_break = _unwrapped(text[slice(*span)])
        splitter = TextSplitter.from_callback(lambda piece: self.count_tokens(piece.replace(soft_break, "\n")), limit)
        for offset, piece in splitter.chunk_indices(shown):
            start, end = _stripped(text, (span[0] + offset, span[0] + offset + len(piece)))
            yield from self._halves(text, start, end, limit)

    def _halves(self, text: str, start: int, end: int, limit: int) -> Iterator[_Piece]:
        """A span, halved until it fits: the library may give too long ones, as its white space is not Python's."""
        if start == end:
            return
        count = self._count(text, start, end)
        if count <= limit:
            yield start, end, count
        elif end - start == 1:
            if count > self.max_tokens:
                raise InputError(
                    f"the character {text[start]!r} alone has {count} tokens, more than reference_tokens "
                    f"({self.max_tokens})"
                )
            yield start, end, count  # beyond what a heading leaves, but it fits without the heading
        else:
            middle = (start + end) // 2
            yield from self._halves(text, *_stripped(text, (start, middle)), limit)
            yield from self._halves(text, *_stripped(text, (middle, end)), limit)

    def _count(self, text: str, start: int, end: int) -> int:
        return self.count_tokens(text[start:end])


def _is_heading(text: str, paragraph: _Span) -> bool:
    """True for a paragraph that goes with the next one."""
    return bool(_HEADING.fullmatch(text, *paragraph)) or text[paragraph[1] - 1] == ":"


def _paragraphs(text: str) -> Iterator[_Span]:
    start = 0
    for blank in (*_BLANK_LINE.finditer(text), None):
        span = _stripped(text, (start, blank.start() if blank else len(text)))
        if span[0] < span[1]:
            yield span
        start = blank.end() if blank else start


def _section_end(text: str, start: int, stop: int) -> int:
    """The place to cut ``text[start:stop]`` so that both sides are split as the whole is: after its last section.

    A section that is longer than all of it is cut after a line, a word or anywhere. The result depends on the text
    from ``start`` on alone, so it is the same however the text was cut into blocks.
    """
    last, before = start, start
    for blank in _BLANK_LINE.finditer(text, start, stop):
        span = _stripped(text, (before, blank.start()))
        if span[0] < span[1] and not _is_heading(text, span):
            last = blank.end()
        before = blank.end()
    if last > start:
        return last
    for mark in ("\n", " "):
        if (place := text.rfind(mark, start, stop)) > start:
            return place + 1
    return stop


def _stripped(text: str, span: _Span) -> _Span:
    piece = text[slice(*span)]
    start = span[0] + len(piece) - len(piece.lstrip())
    return start, max(start, span[0] + len(piece.rstrip()))


def _unwrapped(text: str) -> tuple[str, str]:
    """The text with another character for each line break that is there only because its line was full.

    Such a break would part sentences, as it ranks above their ends. It is one if the next word would have
    made its line longer than the longest of the paragraph, unless an item of a list begins with that word.
    """
    soft_break = next((mark for mark in _SOFT_BREAKS if mark not in text), "\n")
    parts = []
    for paragraph in _BLANK_LINE.split(text):
        lines = paragraph.split("\n")
        width = max(map(len, lines))
        for line, following in pairwise(lines):
            word = following.split(None, 1)[:1]
            full = bool(word) and len(line) + 1 + len(word[0]) > width and not _ITEM.match(following)
            parts += [line, soft_break if full else "\n"]
        parts.append(lines[-1])
    return "".join(parts), soft_break
