"""Figures beside their targets, and checks that run each in a process of its own: none can stop, or spoil, another."""

import json
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Figure:
    """One row of the table."""

    name: str
    value: float | None = None
    unit: str = ""
    most: float | None = None
    """The target, where less is better."""
    least: float | None = None
    """The target, where more is better."""
    error: str | None = None
    """Why there is no value, in one line."""
    details: str = ""
    """Whatever else is worth keeping, in JSON alone."""

    @property
    def verdict(self) -> str:
        """``ok``, ``SHORT`` of its target, ``FAILED`` or, of a figure without target, nothing."""
        if self.error is not None:
            return "skipped" if self.error.startswith("skipped") else "FAILED"
        if self.value is None or (self.most is None and self.least is None):
            return ""
        is_met = (self.most is None or self.value <= self.most) and (self.least is None or self.value >= self.least)
        return "ok" if is_met else "SHORT"

    @property
    def target(self) -> str:
        """For people."""
        if self.most is not None:
            return f"<= {self.most:.4g}"
        return "" if self.least is None else f">= {self.least:.4g}"


@dataclass(frozen=True, slots=True)
class Check(Generic[T]):
    """A named generator of figures, and the seconds that it may take."""

    name: str
    work: Callable[[T], Iterator[Figure]]
    seconds: float


def run(checks: Sequence[Check[T]], given: T, ends: float, method: str = "fork") -> dict[str, list[Figure]]:
    """The figures of each check, in order, until the instant ``ends`` (of `time.monotonic`).

    A process is started by ``method``: a fork does not import torch again, but cannot use a device that its parent has
    used.
    """
    found: dict[str, list[Figure]] = {}
    for check in checks:
        began, left = time.monotonic(), ends - time.monotonic()
        if left < min(10, check.seconds):
            found[check.name] = [Figure(check.name, error="skipped: no time left")]
            continue
        say(f"{check.name} ...")
        found[check.name] = list(_apart(check, given, min(check.seconds, left), method))
        found[check.name].append(Figure("seconds that it took", time.monotonic() - began, "s"))
    return found


def say(text: str) -> None:
    """Print at once: whoever waits for minutes reads along."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def table(found: dict[str, list[Figure]]) -> str:
    """One line for each figure."""
    rows = [("check", "figure", "value", "", "target", "")]
    for check, figures in found.items():
        for one in figures:
            value = "" if one.value is None else f"{one.value:.4g}"
            rows.append((check, one.name, value, one.unit, one.target, f"{one.verdict} {one.error or ''}".strip()))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column == 2 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, [*widths, 0], strict=True))
        ).rstrip()
        for row in rows
    )


def write(path: Path, found: dict[str, list[Figure]], about: dict[str, Any]) -> None:
    """All figures as JSON, with what fell short."""
    checks = {
        check: [{**asdict(one), "target": one.target, "verdict": one.verdict} for one in figures]
        for check, figures in found.items()
    }
    path.write_text(json.dumps({**about, "short": short(found), "checks": checks}, indent=1), encoding="utf-8")


def short(found: dict[str, list[Figure]]) -> list[str]:
    """The figures that fell short or failed, by check and name."""
    return [f"{check}: {one.name}" for check, all in found.items() for one in all if one.verdict in {"SHORT", "FAILED"}]


def _apart(check: Check[T], given: T, seconds: float, method: str) -> Iterator[Figure]:
    """Run one check in a process. Its figures are taken as they come: a check that hangs leaves those it had."""
    context = multiprocessing.get_context(method)
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(check, given, sending))
    process.start()
    sending.close()
    ends = time.monotonic() + seconds
    try:
        while receiving.poll(max(0.0, ends - time.monotonic())):
            yield receiving.recv()
        yield Figure(check.name, error=f"not done in {seconds:.0f} s")
    except EOFError:  # it ended
        process.join(10)
        if process.exitcode:
            yield Figure(check.name, error=f"its process ended with {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _child(check: Check[T], given: T, sending: Connection) -> None:
    try:
        for figure in check.work(given):
            sending.send(figure)
    except BaseException as error:  # noqa: BLE001 - reported, and the next check runs
        line = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
        sending.send(Figure(check.name, error=line[:300], details=traceback.format_exc()))
    sending.close()
