"""Options of all commands of ``m3 eval``, their libraries, and how they end."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3runtime.cli.terminal import print_json, say
from m3runtime.plugins.loading import require

if TYPE_CHECKING:
    from m3runtime.lab.evaluation.report import Report

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for the report and the state of a stopped run.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the questions.")]
References = Annotated[int, typer.Option("--references", min=1, help="Number of invented references.")]


def require_libraries() -> None:
    """Raise `PluginError` if the libraries of reports are not installed."""
    require("m3 eval", "eval")


def finish(report: "Report", out: Path, *, json: bool) -> None:
    """Save a report, and print it as JSON or its summary in words."""
    report.save(out)
    if json:
        print_json(report.to_json())
        return
    for line in report.summary:
        say(line)
    say(f"{out / 'report.md'}")
