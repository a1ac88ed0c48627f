"""What is done to a bank in a process of its own, and what it then delivers."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path

from m3runtime.errors import M3Error
from tests.end_to_end.commands import Place
from tests.hostile.banks import Delivered, differs, make_bank, serve
from tests.hostile.nursery import Nursery

MOST_BYTES = 1 << 30
"""Memory that no case may take."""


@dataclass(frozen=True)
class Case:
    """A way to spoil a bank."""

    spoil: Callable[[Place], None]
    expected: str
    """A regular expression for the outcome: see `spoiled`."""
    act: Callable[[Place], str] | None = None
    """What is done then, instead of serving the bank; returns the outcome."""
    forged: bool = False
    """Whether digests were computed anew over what is not so: then what is in the bank is what is delivered."""


def make(place: Place, _: None) -> str:
    """The bank that every case has a copy of, another one like it, and what the first delivers."""
    make_bank(place)
    make_bank(Place(place.folder / "other"), salt="Elsewhere. ", seed=1)
    before = serve(place)
    place.text("before.json", before.to_json())
    wrong = differs(before, serve(place))
    assert wrong is None, wrong
    return ""


def before(place: Place) -> Delivered:
    return Delivered.of((place.folder / "before.json").read_text())


def check(nursery: Nursery, module: str, cases: Mapping[str, Case], name: str) -> None:
    """Run one case of a module's table, and hold how it ended against what the case and this folder promise."""
    ended = nursery.run("tests.hostile.cases:spoiled", [module, name])
    assert ended.how == "returned", ended.text
    assert re.search(cases[name].expected, ended.text), ended.text
    assert ended.peak_bytes < MOST_BYTES, f"{ended.peak_bytes >> 20} MiB: {ended.text}"


def spoiled(place: Place, which: tuple[str, str]) -> str:
    """Spoil the copy and serve it. ``refused: error`` if a typed error says so; else what is missing, or ``whole``.

    Raises `AssertionError` for a wrong answer, and for an error that is not one line about this bank.
    """
    module, name = which
    case: Case = import_module(module).CASES[name]
    was = before(place)
    case.spoil(place)
    try:
        return (case.act or partial(outcome, was=was, forged=case.forged))(place)
    except M3Error as error:
        message = str(error)
        assert len(message.splitlines()) == 1, message
        assert len(message) < 2000, message
        assert str(place.folder) in message, f"names no file: {message}"
        return f"refused: {type(error).__name__}: {message}"


def outcome(place: Place, was: Delivered, *, forged: bool = False) -> str:
    """Serve the bank: ``missing: ids``, ``whole``, or ``less`` where anything else is not as it was."""
    now = serve(place)
    wrong = None if forged else differs(was, now)
    assert wrong is None, wrong
    missing = sorted({*was.memories} - {*now.memories}, key=int)
    if missing:
        return f"missing: {' '.join(missing)}"
    return "whole" if now == was else "less"


def outside(place: Place) -> Path:
    """A folder beside the bank that nobody may touch."""
    folder = place.folder / "outside"
    folder.mkdir(exist_ok=True)
    return folder
