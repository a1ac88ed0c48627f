"""`say` and `print_json`: the output of every command. Control characters out of a text do not reach the terminal."""

import json
import re
from typing import Any

import typer

_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""Characters that move the cursor, change the terminal or turn the direction of text; tab and line end are kept."""


def printable(text: str) -> str:
    r"""A text in which control characters are written as escapes, such as ``\x1b``."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str = "", *, nl: bool = True, err: bool = False) -> None:
    """Print a text for people, on standard error if ``err``."""
    typer.echo(printable(text), nl=nl, err=err)


def print_json(value: Any) -> None:
    """Print one line of JSON on standard output."""
    line = json.dumps(value, ensure_ascii=False)
    typer.echo(_CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", line))
