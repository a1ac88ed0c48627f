"""`html_text`: the text of HTML markup."""

import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bs4.element import PageElement, Tag

_HEADINGS = {"title": "# "} | {f"h{level}": "#" * level + " " for level in range(1, 7)}
_BLOCKS = frozenset(
    (
        *_HEADINGS,
        *("address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "div", "dl", "dt"),
        *("fieldset", "figcaption", "figure", "footer", "form", "header", "hr", "li", "main", "nav", "noframes", "ol"),
        *("option", "p", "pre", "section", "summary", "table", "td", "textarea", "th", "tr", "ul"),
    )
)
_TIGHT = frozenset(("dd", "li", "option", "tr"))
"""Blocks with no blank line before and after them."""
_NO_TEXT = frozenset(("noscript", "script", "style", "template"))
_NO_CELL = (*_HEADINGS, "dl", "ol", "pre", "table", "tr", "ul")
"""Elements that a row of a table does not have if it is written in a line."""


def html_text(markup: str) -> str:
    """The text of HTML, with its structure as in Markdown.

    Blocks are parted by blank lines. Headings begin with ``#`` and items of lists with ``-`` or a number; the cells of
    a table's row stand between ``|``; code of several lines is fenced. A term's description (``dd``) is indented below
    it. The page's title is a heading, if the page has none of level 1. Pictures are their ``alt`` text. Scripts,
    styles, templates and text for browsers without scripts are left out.
    """
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, XMLParsedAsHTMLWarning
    from bs4.element import Tag

    with warnings.catch_warnings():
        # It is HTML because its name says so, however it looks.
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        soup = BeautifulSoup(markup, "lxml")
    text = _Text()
    titled = soup.find("h1") is None
    # Each element on the way in, and a block once more on the way out. A recursion would end at deep markup.
    ahead: list[tuple[PageElement, bool]] = [(soup, False)]
    while ahead:
        element, left = ahead.pop()
        if words := _own_words(element):
            text.add(words)
        elif not isinstance(element, Tag):
            continue
        elif left:
            text.leave(element.name)
        elif element.name == "pre":
            text.code(_words(element))
        elif element.name == "tr" and _is_line(element):
            text.row([" ".join(_words(cell).split()) for cell in element.find_all(("td", "th"))])
        elif element.name == "br":
            text.part(1)
        elif element.name == "title" and element.find_parent("svg"):
            text.part(2)
            text.add(_words(element))
            text.part(2)
        elif element.name not in _NO_TEXT and (element.name != "title" or titled):
            if element.name in _BLOCKS:
                text.enter(element)
                ahead.append((element, True))
            ahead.extend((child, False) for child in reversed(element.contents))
    return str(text)


class _Text:
    """The text so far, and what is written before the next word: line breaks and the beginning of its line."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._breaks = 0
        self._mark = ""
        """The margin, and the marks of a heading or item that has no words yet."""
        self._margins = [""]
        """The white space at the beginning of lines, for each open block that has some."""
        self._items: list[int] = []
        """The number of the next item of each open list; 0 in those without numbers."""

    def __str__(self) -> str:
        return re.sub(r"[^\S\n]+(?=\n|$)", "", "".join(self._parts))

    def enter(self, block: "Tag") -> None:
        """Begin a block."""
        name = block.name
        self.part(1 if name in _TIGHT else 2)
        if mark := _HEADINGS.get(name):
            self._mark = (self._mark or self._margins[-1]) + mark
        elif name in ("ol", "ul"):
            self._items.append(int(name == "ol"))
        elif name == "li":
            number = self._items[-1] if self._items else 0
            mark = f"{number}. " if number else "- "
            if number:
                self._items[-1] += 1
            self._mark = (self._mark or self._margins[-1]) + mark
            self._margins.append(" " * len(self._mark))
        elif name == "dd":
            self._margins.append(self._margins[-1] + "    ")

    def leave(self, name: str) -> None:
        """End a block."""
        self.part(1 if name in _TIGHT or name == "dt" else 2)
        if name in _HEADINGS or name == "li":
            self._mark = ""
        if name in ("ol", "ul"):
            self._items.pop()
        elif name in ("dd", "li"):
            self._margins.pop()

    def part(self, breaks: int) -> None:
        """End the line, or with 2 the paragraph."""
        self._breaks = max(self._breaks, breaks)

    def add(self, words: str) -> None:
        """Add words to the line. White space counts once, and not at the line's ends."""
        words = re.sub(r"\s+", " ", words)
        if self._breaks or not self._parts or self._parts[-1][-1:].isspace():
            words = words.lstrip()
        if words:
            self._begin()
            self._parts.append(words)

    def row(self, cells: Iterable[str]) -> None:
        """Add a line of cells, unless they are all empty."""
        cells = list(cells)
        self.part(1)
        if any(cells):
            self._begin()
            self._parts.append(f"| {' | '.join(cells)} |")
        self.part(1)

    def code(self, text: str) -> None:
        """Add lines as they are, between fences if they are several."""
        lines = text.strip("\n").split("\n")
        self.part(2)
        if text.strip():
            self._begin()
            if len(lines) > 1:
                fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
                lines = [fence, *lines, fence]
            self._parts.append(("\n" + self._margins[-1]).join(lines))
        self.part(2)

    def _begin(self) -> None:
        """Write what stands before the words to come."""
        if self._breaks or not self._parts:
            self._parts.append(("\n" * self._breaks if self._parts else "") + (self._mark or self._margins[-1]))
            self._breaks, self._mark = 0, ""


def _own_words(element: "PageElement") -> str:
    """The words of a string or a picture; of comments and declarations, and of other elements, none."""
    from bs4.element import CData, NavigableString, Tag

    if isinstance(element, Tag):
        return str(element.get("alt", "")) if element.name == "img" else ""
    return str(element) if type(element) in (NavigableString, CData) else ""


def _words(element: "Tag") -> str:
    """The words of an element and all in it, with line breaks."""
    return "".join(
        "\n" if getattr(inner, "name", None) == "br" else _own_words(inner)
        for inner in element.descendants
        if inner.parent is None or inner.parent.name not in _NO_TEXT
    )


def _is_line(row: "Tag") -> bool:
    """True if a row of a table can be written in a line."""
    cells = row.find_all(("td", "th"))
    return not row.find(_NO_CELL) and all(len(cell.find_all(("div", "p"))) < 2 for cell in cells)
