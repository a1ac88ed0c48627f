"""Word documents: paragraphs, lists and tables; headings as Markdown's."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from m3runtime.documents.parts import Part
from m3runtime.documents.readers.opening import check_zip, library, readable

_HEADING = re.compile(r"Title|Heading ([1-6])")
_MARKS = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}
"""The characters that elements stand for."""
_NO_TEXT = {"del", "moveFrom"}
"""Elements with text that was deleted while changes were tracked."""


def read(path: Path) -> Iterator[Part]:
    """The paragraphs and table rows in order. Word knows no pages: they are made when a document is shown."""
    docx = library(path, "docx")
    paragraph = library(path, "docx.text.paragraph").Paragraph
    check_zip(path, "Word", "word/document.xml")
    with readable(path, "Word"):
        document = docx.Document(str(path))
        above = ""  # a hash for the title, below which all headings are
        for element in _blocks(document.element.body):
            if _name(element) == "tbl":
                text = _table(element)
            else:
                style = paragraph(element, document._body).style
                text = _paragraph(_text(element), style, above)
                above = "#" if style is not None and style.name == "Title" else above
            if text:
                yield Part(text)


def _blocks(parent: Any) -> Iterator[Any]:
    """The paragraphs and tables in an element, also those in content controls and tracked insertions."""
    for element in parent:
        if _name(element) in ("p", "tbl"):
            yield element
        elif _name(element) in ("sdt", "sdtContent", "ins", "moveTo", "customXml"):
            yield from _blocks(element)


def _paragraph(text: str, style: Any, above: str) -> str:
    while text and style is not None:  # a style of the author's own may be based on a heading's
        name = style.name or ""
        if found := _HEADING.fullmatch(name):
            hashes = above + "#" * int(found[1]) if found[1] else "#"
            return f"{hashes[:6]} {' '.join(text.split())}\n\n"
        if name.startswith("List"):
            return f"- {text}\n"
        style = style.base_style
    return text and f"{text}\n\n"


def _table(table: Any) -> str:
    """A line for each row, with its cells between bars; a merged cell comes once."""
    rows = [[_cell(cell) for cell in _children(row, "tc")] for row in _children(table, "tr")]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows if any(row)) + "\n" * any(map(any, rows))


def _cell(cell: Any) -> str:
    texts = (_table(block) if _name(block) == "tbl" else _text(block) for block in _blocks(cell))
    return " ".join(" ".join(texts).split())


def _children(parent: Any, name: str) -> Iterator[Any]:
    for element in parent:
        if _name(element) == name:
            yield element
        elif _name(element) in ("sdt", "sdtContent"):
            yield from _children(element, name)


def _text(element: Any) -> str:
    return "".join(_pieces(element)).strip()


def _pieces(parent: Any) -> Iterator[str]:
    for element in parent:
        name = _name(element)
        if name == "t":
            yield element.text or ""
        elif name in _MARKS:
            yield _MARKS[name]
        elif name not in _NO_TEXT:
            yield from _pieces(element)


def _name(element: Any) -> str:
    """The name of an element without its namespace; empty for a comment."""
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""
