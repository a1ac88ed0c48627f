"""The help of ``m3``: every command in its panel, and one clear sentence about each."""

import re
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest
import typer

from m3runtime import cli
from tests.end_to_end.commands import M3, Place, environment

PANELS = {
    "Use a bank": ["init", "write", "sync", "ask", "chat", "serve", "search"],
    "Keep a bank": [
        *("inspect", "forget", "compact", "export", "import"),
        *("verify", "config", "plan", "top", "calibrate-bias", "codec"),
    ],
    "Lab: evaluate, measure, train": ["train", "eval", "bench"],
}


def commands(group: Any = None, names: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Every command and group of commands below ``m3``, by what is typed."""
    for name, command in (group or typer.main.get_command(cli.app)).commands.items():
        yield " ".join((*names, name)), command
        if hasattr(command, "commands"):
            yield from commands(command, (*names, name))


def test_every_command_stands_in_its_panel() -> None:
    done = subprocess.run([M3, "--help"], env=environment(), capture_output=True, text=True, check=True)
    assert done.stderr == ""
    found: dict[str, list[str]] = {}
    for line in done.stdout.splitlines():
        if title := re.match(r"╭─ (.+?) ─+╮", line):
            listed = found.setdefault(title[1], [])
        elif command := re.match(r"│ ([a-z-]+) ", line):
            listed.append(command[1])
    del found["Options"]
    assert found == PANELS


@pytest.mark.parametrize(("name", "command"), list(commands()), ids=[name for name, _ in commands()])
def test_a_command_is_described_by_one_sentence(name: str, command: Any) -> None:
    first, *rest = command.help.split("\n\n")[0].splitlines()
    assert not rest, "the first sentence must fit a line"
    assert re.match(r"(?!What|Of|Those|Whether|That)[A-Z][a-z]+\b", first)
    assert first.endswith(".")
    assert ". " not in first
    for option in command.params:
        assert option.help, f"{name} {option.name} has no help"
        assert option.help[0].isupper()
        assert option.help.endswith((".", "..."))


def test_every_command_has_help(place: Place) -> None:
    for name, _ in commands():
        result = place.m3(*name.split(), "--help")
        assert (result.code, result.err) == (0, "")
