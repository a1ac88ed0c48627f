"""`Splitter`: cuts a text into passages that fit a reference."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from m3runtime.documents.cutting import LEVELS, Span, letters, stripped
from m3runtime.documents.headings import Piece, outline
from m3runtime.documents.packing import Leaf, pack
from m3runtime.documents.paragraphs import paragraphs
from m3runtime.documents.reference import BETWEEN_TITLES, Place, Reference
from m3runtime.errors import ConfigError, InputError

CountTokens = Callable[[str], int]
"""Counts the tokens that a text has to the model, without special tokens."""

# Costs, where a passage costs 1: see `pack`.
_AFTER_HEADING = 4.0
_AFTER_COLON = 1.0
_IN_FENCE = 0.3
_CUTS = (0.2, 0.4, 1.5, 2.0)
"""Of a cut between lines, sentences, clauses and words."""
_IN_WORD = 3.0
_SECTIONS = 2.1
"""Of a passage of two sections, for each level that the second one is further up one more half."""


@dataclass(frozen=True, slots=True)
class _Section:
    """A heading and the pieces below it, up to the next one."""

    pieces: list[Piece]
    tokens: list[int]
    """Of each piece with the gap before it."""

    @property
    def path(self) -> tuple[str, ...]:
        return self.pieces[-1].path

    @property
    def has_body(self) -> bool:
        return not self.pieces[-1].is_heading


class Splitter:
    """Splits texts into passages of at most ``max_tokens`` tokens, with nothing but white space between them.

    Paragraphs, list items and table rows of a section are joined as far as they fit; where they do not all fit, the
    passages are about equally long. A section begins with a heading or a dictionary's headword
    (`m3runtime.documents.headings`), and its passages are its own, except that sections of less than an eighth of
    ``max_tokens`` are joined with a neighbour. A heading goes with what follows. Paragraphs that fit a passage are not
    cut, others between lines, sentences, clauses or words, in this order of preference.

    ``count_tokens`` is the model's own. As thread-safe as that is. Keeps about ``longest`` characters in memory; a
    section or paragraph that is longer is cut. Takes time in proportion to the text. Raises `ConfigError` if
    ``max_tokens`` is not at least 1.
    """

    def __init__(self, count_tokens: CountTokens, *, max_tokens: int = 128, longest: int = 1 << 20) -> None:
        if max_tokens < 1:
            raise ConfigError(f"reference_tokens must be at least 1, not {max_tokens}")
        self.count_tokens = count_tokens
        self.max_tokens = max_tokens
        self.longest = longest
        self._least = max(1, max_tokens // 8)

    def split(self, text: str, source: str = "") -> list[Reference]:
        """The passages of a text from ``source``, in order; a blank text has none.

        Raises `InputError` if ``text`` is not valid Unicode, or if one character alone has more than
        ``max_tokens`` tokens.
        """
        return list(self.stream([text], source))

    def stream(self, blocks: Iterable[str], source: str = "") -> Iterator[Reference]:
        """The passages of a text that comes in blocks, cut anywhere: the same as `split` gives for all of it.

        Raises what `split` does, when it comes to that place.
        """
        for group in self._groups(outline(paragraphs(blocks, self.longest))):
            offset = group[0].pieces[0].start
            text = "".join(piece.gap + piece.text for section in group for piece in section.pieces)
            text = text[len(group[0].pieces[0].gap) :]
            for passage in pack(self._leaves(group, text, offset), least=self._least, most=self.max_tokens):
                heading = BETWEEN_TITLES.join(self._path(group, passage))
                for (start, end), tokens in self._exact(text, passage):
                    place = Place(source, offset + start, offset + end)
                    yield Reference(text[start:end], tokens, heading, (place,))

    def _groups(self, pieces: Iterable[Piece]) -> Iterator[list[_Section]]:
        """Consecutive sections that may share passages: no two that could stand alone."""
        group: list[_Section] = []
        size = 0
        for section in self._sections(pieces):
            if group and (size > self.longest or (self._stands(group[-1]) and self._stands(section))):
                yield group
                group, size = [], 0
            group.append(section)
            size += sum(len(piece.text) for piece in section.pieces)
        if group:
            yield group

    def _sections(self, pieces: Iterable[Piece]) -> Iterator[_Section]:
        section, size = _Section([], []), 0
        for piece in pieces:
            try:
                piece.text.encode()
            except UnicodeEncodeError as error:
                place = piece.start + error.start
                raise InputError(f"character {place} of the text is half a character (a lone surrogate)") from error
            if section.pieces and (piece.begins or size > self.longest):
                yield section
                section, size = _Section([], []), 0
            section.pieces.append(piece)
            section.tokens.append(self.count_tokens(piece.gap + piece.text))
            size += len(piece.text)
        if section.pieces:
            yield section

    def _stands(self, section: _Section) -> bool:
        return section.has_body and sum(section.tokens) >= self._least

    def _leaves(self, group: Sequence[_Section], text: str, offset: int) -> list[Leaf]:
        """The leaves of consecutive sections, whose text begins at ``offset``."""
        leaves: list[Leaf] = []
        before: _Section | None = None
        for number, section in enumerate(group):
            glued = 0  # tokens of the headings right before
            for piece, tokens in zip(section.pieces, section.tokens, strict=True):
                cut = join = 0.0
                if before and piece is section.pieces[0]:
                    join = _crossing(before, section)
                    cut = 0.0 if before.has_body else _AFTER_HEADING
                elif glued:
                    cut = _AFTER_HEADING
                elif leaves and text[leaves[-1].span[1] - 1] == ":":
                    cut = _AFTER_COLON
                elif piece.in_fence:
                    cut = _IN_FENCE
                room = self.max_tokens - (glued if 2 * glued <= self.max_tokens else 0)
                for span in stripped(text, piece.start - offset, piece.start - offset + len(piece.text)):
                    leaves += self._cut(text, Leaf(span, tokens, number, cut, join), 0, room)
                glued = glued + tokens if piece.is_heading else 0
            before = section
        return leaves

    def _cut(self, text: str, leaf: Leaf, level: int, room: int) -> Iterator[Leaf]:
        """The leaf, or if it has more than ``room`` tokens, finer ones, the first of which has no more."""
        if leaf.tokens <= room:
            yield leaf
            return
        if level < len(LEVELS):
            spans, cost = LEVELS[level](text, leaf.span), _CUTS[level]
        else:
            size = min(max(1, self.max_tokens // 4), (leaf.span[1] - leaf.span[0]) // 2)
            if not size:
                yield leaf
                return
            spans, cost = letters(text, leaf.span, size), _IN_WORD
        end = leaf.span[0]
        for span in spans:
            if first := span[0] == leaf.span[0]:
                gap, cut, join = span[0], leaf.cut, leaf.join
            else:
                gap, cut, join = end, cost, 0.0
            tokens = leaf.tokens if span == leaf.span else self.count_tokens(text[gap : span[1]])
            finer = Leaf(span, tokens, leaf.section, cut, join)
            yield from self._cut(text, finer, level + 1, room if first else self.max_tokens)
            end = span[1]

    def _exact(self, text: str, passage: Sequence[Leaf]) -> Iterator[tuple[Span, int]]:
        """The span and tokens of a passage, which is halved if its leaves together have more tokens than one by one."""
        span = passage[0].span[0], passage[-1].span[1]
        tokens = self.count_tokens(text[slice(*span)])
        if tokens <= self.max_tokens:
            yield span, tokens
        elif len(passage) > 1:
            middle = (len(passage) + 1) // 2
            yield from self._exact(text, passage[:middle])
            yield from self._exact(text, passage[middle:])
        elif span[1] - span[0] > 1:
            middle = (span[0] + span[1]) // 2
            for start, end in ((span[0], middle), (middle, span[1])):
                for part in stripped(text, start, end):
                    yield from self._exact(text, [Leaf(part, 0, 0)])
        else:
            raise InputError(
                f"the character {text[span[0]]!r} alone has {tokens} tokens, more than reference_tokens "
                f"({self.max_tokens})"
            )

    def _path(self, group: Sequence[_Section], passage: Sequence[Leaf]) -> Sequence[str]:
        """The headings above a passage: of its one section that stands alone, or those that its sections share."""
        sections = [group[number] for number in dict.fromkeys(leaf.section for leaf in passage)]
        bodies = [section for section in sections if section.has_body] or sections[-1:]
        large = [section for section in bodies if self._stands(section)]
        paths = [section.path for section in (large if len(large) == 1 else bodies)]
        return _shared(paths)


def _crossing(before: _Section, after: _Section) -> float:
    """The cost of a passage of two sections."""
    shared = len(_shared([before.path, after.path]))
    if shared == len(before.path) and not before.has_body:
        return 0.0
    return _SECTIONS + 0.5 * max(0, len(before.path) - 1 - shared)


def _shared(paths: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """The longest beginning of all these paths."""
    first, last = min(paths), max(paths)
    same = next((place for place, title in enumerate(first) if last[place : place + 1] != (title,)), len(first))
    return first[:same]
