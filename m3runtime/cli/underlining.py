"""`underline`: an answer that was shown on a terminal is written anew, with the spans that a memory was read for.

It appears token by token, and attention tells what was read at its end. So the cursor goes back to where it began.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import typer

from m3runtime.cli.terminal import printable

if TYPE_CHECKING:
    from m3runtime.adapters.grounding import Span

LEAST = 0.05
"""The least share of attention of a span that is underlined."""
_ON, _OFF = "\x1b[4m", "\x1b[24m"


def underline(text: str, spans: "Sequence[Span]", numbers: Mapping[int, int]) -> None:
    """Underline an answer that was printed as the last thing on the terminal, and a line feed after it.

    ``numbers`` are those of memories in the list below. Nothing happens where output is no terminal that can, and for
    an answer whose beginning has left the screen.
    """
    if not spans or not sys.stdout.isatty():
        return
    from rich.console import Console

    console = Console()
    rows = rows_of(printable(text), console.width)
    if console.is_dumb_terminal or console.legacy_windows or rows >= console.height:
        return
    typer.echo(f"\x1b[{rows}A\r\x1b[J{underlined(text, spans, numbers)}")


def underlined(text: str, spans: "Sequence[Span]", numbers: Mapping[int, int]) -> str:
    """The text with codes that underline the spans, and after each the number of its memory."""
    parts, end = list[str](), 0
    for span in spans:
        part = text[span.start : span.end]
        start = span.start + len(part) - len(part.lstrip())
        parts += [printable(text[end:start]), _ON, printable(text[start : span.end]), _OFF, f"[{numbers[span.id]}]"]
        end = span.end
    return "".join([*parts, printable(text[end:])])


def rows_of(text: str, width: int) -> int:
    """The rows of a terminal that a text takes."""
    from rich.cells import cell_len

    return sum(max(1, -(-cell_len(line.expandtabs()) // width)) for line in text.split("\n"))
