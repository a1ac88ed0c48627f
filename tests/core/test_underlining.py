"""An answer on a terminal is written anew with its spans underlined; elsewhere it stays as it is."""

import os
import pty
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout

import pytest
import typer

from m3runtime.adapters.grounding import Span
from m3runtime.cli.terminal import rows_of
from m3runtime.cli.underlining import underline, underlined

SPANS = (Span(0, 9, 31, 0.4), Span(9, 16, 5, 0.2))
NUMBERS = {5: 1, 31: 2}


def test_spans_have_the_numbers_of_their_memories() -> None:
    assert underlined(" The lamp is \x1bblue.", SPANS, NUMBERS) == (
        " \x1b[4mThe lamp\x1b[24m[2] \x1b[4mis \\x1bbl\x1b[24m[1]ue."
    )


@pytest.mark.parametrize(
    ("text", "rows"),
    [("", 1), ("ten cells.", 1), ("eleven cell", 2), ("a\n\nb", 3), ("\u4e00" * 6, 2), ("a\tb", 1), ("a\tbcd", 2)],
)
def test_rows(text: str, rows: int) -> None:
    assert rows_of(text, 10) == rows


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, tuple[Span, ...]], str]]:
    """A function that underlines an answer on a terminal of 20 columns and 4 lines, and returns what it is sent."""
    master, slave = pty.openpty()
    for name, value in (("COLUMNS", "20"), ("LINES", "4"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)

    def show(text: str, spans: tuple[Span, ...]) -> str:
        with redirect_stdout(file):
            underline(text, spans, NUMBERS)
            typer.echo("end")
        return os.read(master, 1000).decode().removesuffix("end\r\n")

    with os.fdopen(slave, "w") as file:
        yield show
    os.close(master)


def test_the_cursor_goes_back_to_the_beginning(shown: Callable[[str, tuple[Span, ...]], str]) -> None:
    text = " The lamp is blue and green."
    assert shown(text, SPANS) == f"\x1b[2A\r\x1b[J{underlined(text, SPANS, NUMBERS)}\r\n"


@pytest.mark.parametrize(("text", "spans"), [("a\nb\nc\nd\ne", SPANS), ("The lamp", ())])
def test_what_has_left_the_screen_stays(
    shown: Callable[[str, tuple[Span, ...]], str], text: str, spans: tuple[Span, ...]
) -> None:
    assert shown(text, spans) == ""


def test_no_codes_for_a_terminal_that_knows_none(
    shown: Callable[[str, tuple[Span, ...]], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert shown(" The lamp is blue.", SPANS) == ""


def test_nor_where_output_is_piped(capsys: pytest.CaptureFixture[str]) -> None:
    underline(" The lamp is blue.", SPANS, NUMBERS)
    assert capsys.readouterr().out == ""
