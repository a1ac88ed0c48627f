"""Texts out of documents do not command the terminal, and a bank can be read where nothing can be written."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from rich.table import Table

from m3runtime.cli.terminal import console, printable
from tests.end_to_end.commands import M3, Place, environment

EVIL = "The harbour\x1b]0;owned\x07 lamp \x1b[2Jburns \x9b31m walnut \u202eoil at dusk.\x0b"


@pytest.fixture
def evil(place: Place) -> Place:
    place.text("evil.txt", EVIL)
    assert place.m3("write", "evil.txt", "--whole").code == 0
    return place


@pytest.mark.parametrize(
    "command", [["search", "harbour lamp"], ["ask", "The harbour lamp burns walnut oil at dusk."], ["inspect", "0"]]
)
def test_control_characters_do_not_reach_the_terminal(evil: Place, command: list[str]) -> None:
    result = evil.m3(*command)
    assert result.code == 0, result.err
    shown = result.out + result.err
    assert "\\x1b]0;owned\\x07" in shown
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)
    again = evil.m3(*command, "--json")
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", again.out)
    assert any(EVIL.strip() in text for text in texts(again.json))


def texts(found: object) -> list[str]:
    """Every text in a JSON value."""
    if isinstance(found, str):
        return [found]
    inner = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    return [text for one in inner for text in texts(one)]


def test_line_ends_and_tabs_stay() -> None:
    assert printable("a\tb\nc 東京 é") == "a\tb\nc 東京 é"
    assert printable("\x1b[0m\x7f") == "\\x1b[0m\\x7f"


def test_every_command_prints_through_one_place() -> None:
    import m3runtime.cli

    for file in Path(m3runtime.cli.__file__).parent.glob("*.py"):
        assert file.name == "terminal.py" or not re.search(r"typer\.echo\(|\bConsole\(", file.read_text()), file


def test_tables_have_no_control_characters_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("[bold]name", title=EVIL)
    table.add_row(f"a.txt\x1b[2J [red]{EVIL}")
    console().print(table, "\x9b31m", EVIL)
    shown = capsys.readouterr().out
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", shown)
    assert "[bold]name" in shown
    assert "[red]" in shown
    assert "\\x1b[2J" in shown
    rows = [line for line in shown.splitlines() if line.startswith(("│", "┃"))]
    assert len({len(row) for row in rows}) == 1  # columns are as wide as what is shown


def test_a_bank_on_a_read_only_file_system_answers(written: Place) -> None:
    mounted = "mount --bind bank bank && mount -o remount,ro,bind bank && exec "
    probe = ["unshare", "-m", "sh", "-c", f"{mounted} test ! -w bank"]
    if not shutil.which("unshare") or subprocess.run(probe, cwd=written.folder, capture_output=True).returncode:
        pytest.skip("cannot mount here")
    question = "What does the harbour lamp burn?"
    script = f"{mounted} {M3} ask '{question}' --json"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], cwd=written.folder, env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "walnut oil" in done.stdout
    assert json.loads(done.stdout)["answer"] == written.m3("ask", question, "--json").json["answer"]
