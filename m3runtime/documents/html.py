"""`html_text`: the text of HTML markup."""

import re
import warnings

_BLANK_LINES = re.compile(r"\n(?:[^\S\n]*\n)+")
_EMPTY_HEADINGS = re.compile(r"(?m)^#{1,6}[ ]*$")
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_BLOCKS = frozenset(
    (
        *_HEADINGS,
        *("address", "article", "aside", "blockquote", "body", "caption", "dd", "details", "div", "dl", "dt"),
        *("fieldset", "figcaption", "figure", "footer", "form", "header", "hr", "li", "main", "nav", "ol"),
        *("option", "p", "pre", "section", "summary", "table", "tr", "ul"),
    )
)
_NO_TEXT = frozenset(("head", "noscript", "script", "style", "template"))


def html_text(markup: str) -> str:
    """The text of HTML: blocks parted by blank lines, headings as markdown's, no scripts and styles."""
    from bs4 import BeautifulSoup, MarkupResemblesLocatorWarning, XMLParsedAsHTMLWarning
    from bs4.element import CData, NavigableString, PageElement, Tag

    with warnings.catch_warnings():
        # It is HTML because its name says so, however it looks.
        warnings.simplefilter("ignore", XMLParsedAsHTMLWarning)
        warnings.simplefilter("ignore", MarkupResemblesLocatorWarning)
        soup = BeautifulSoup(markup, "html.parser")
    parts = ["\n"]
    verbatim = 0  # how many <pre> are open
    # Each element on the way in, and a block once more on the way out. A recursion would end at deep markup.
    ahead: list[tuple[PageElement, bool]] = [(soup, False)]
    while ahead:
        element, left = ahead.pop()
        if isinstance(element, Tag):
            if element.name in _BLOCKS:
                parts.append("\n\n")
                verbatim += (element.name == "pre") * (-1 if left else 1)
            if left or element.name in _NO_TEXT:
                continue
            if element.name in _BLOCKS:
                ahead.append((element, True))
                if element.name in _HEADINGS:
                    parts.append(_HEADINGS[element.name])
            elif element.name == "br":
                parts.append("\n")
            elif element.name in ("td", "th") and not parts[-1][-1].isspace():
                parts.append(" ")
            ahead.extend((child, False) for child in reversed(element.contents))
        elif type(element) in (NavigableString, CData):  # not comments and declarations, which are subclasses
            text = str(element) if verbatim else re.sub(r"\s+", " ", str(element))
            if not verbatim and parts[-1][-1].isspace():
                text = text.lstrip(" ")
            if text:
                parts.append(text)
    lines = (line.rstrip() for line in "".join(parts).split("\n"))
    return _BLANK_LINES.sub("\n\n", _EMPTY_HEADINGS.sub("", "\n".join(lines))).strip()
