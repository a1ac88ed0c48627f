"""`say`, `print_json`, `rewrite` and `console`: the output of every command.

Control characters out of a text do not reach the terminal.
"""

import json
import re
import sys
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Characters that move the cursor, change the terminal or turn the direction of text; tab and line end are kept."""


def printable(text: str) -> str:
    r"""A text in which control characters are written as escapes, such as ``\x1b``."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str = "", *, nl: bool = True, err: bool = False) -> None:
    """Print a text for people, on standard error if ``err``."""
    typer.echo(printable(text), nl=nl, err=err)


def console(*, err: bool = False) -> "Console":
    """A console of rich, for tables. It prints texts as they are, without markup, and control characters as escapes."""
    from rich.console import Console

    class Printable(Console):
        def render_str(self, text: str, **settings: Any) -> "Text":
            return super().render_str(printable(text), **settings)

    return Printable(stderr=err, markup=False, emoji=False)


def rewrite(shown: str, text: str) -> None:
    """Print a text, with its own codes, in the place of one that was shown as the last thing, and a line feed after it.

    Nothing happens where output is no terminal that can, and if the beginning has left the screen.
    """
    if not sys.stdout.isatty():
        return
    from rich.console import Console

    screen = Console()
    rows = rows_of(printable(shown), screen.width)
    if not (screen.is_dumb_terminal or screen.legacy_windows or rows >= screen.height):
        typer.echo(f"\x1b[{rows}A\r\x1b[J{text}")


def rows_of(text: str, width: int) -> int:
    """The rows of a terminal that a text takes."""
    from rich.cells import cell_len

    return sum(max(1, -(-cell_len(line.expandtabs()) // width)) for line in text.split("\n"))


def print_json(value: Any) -> None:
    """Print one line of JSON on standard output."""
    line = json.dumps(value, ensure_ascii=False)
    typer.echo(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", line))
