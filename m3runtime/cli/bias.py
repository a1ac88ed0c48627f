"""``m3 calibrate-bias``: directions by which plain key slots get weights, or are seen by nobody."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3runtime.cli.options import ConfigFile, Json, Set, configuration
from m3runtime.cli.progress import progress_bars
from m3runtime.cli.terminal import print_json, say

if TYPE_CHECKING:
    from m3runtime.writing.calibrating import BiasReport


def calibrate_bias(
    length: Annotated[
        int | None,
        typer.Option(
            "--length",
            min=64,
            help="Tokens of the longest context to serve, prompt and answer; default: 8192, or all that the model has.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option("--text", help="Files or folders to read instead of the bank's references; may be repeated."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure, and do not write the file.")] = False,
    config: ConfigFile = None,
    set: Set = None,
    json: Json = False,
) -> None:
    """Fit key directions that all queries of the model meet alike, for weights and masks in plain slots.

    An inference stack whose attention takes neither weights nor masks needs them, such as vLLM. They are measured on
    held-out text. A model on which they are not good enough is refused, and nothing is written.
    """
    settings = configuration(config, set)
    from m3runtime.writing import calibrating

    with progress_bars(shown=not json) as progress:
        report = calibrating.calibrate_bias(
            settings, length=length, texts=text or (), dry_run=dry_run, progress=progress
        )
    if json:
        file = None if report.path is None else str(report.path)
        print_json({**asdict(report.directions.facts), "file": file, "bank": str(settings.bank)})
        return
    _show(report)


def _show(report: "BiasReport") -> None:
    facts, directions = report.directions.facts, report.directions.directions
    layers, heads, _ = directions.shape
    say(
        f"bias directions of {layers} layers and {heads} KV heads, measured at {facts.length} positions; "
        "queries should meet them with logit 1"
    )
    first = facts.offset
    for one in facts.stretches:
        say(
            f"  positions {first}-{one.end - 1}: error {one.error:.3f} in the median head, "
            f"logits {one.least:.2f} to {one.greatest:.2f}"
        )
        first = one.end
    taken = f"1,024 of them take {facts.null_weight:.1g} of the attention of the worst head, on average"
    say(f"null slots: good at {-facts.null_level:g}; {taken}")
    errors = f"error {facts.weight_error:.3f} in the median head, {facts.greatest_error:.3f} in the worst"
    say(f"weights: {'good' if facts.weights else 'not good enough, use null slots alone'}; {errors}")
    say("nothing was written" if report.path is None else f"written: {report.path}")
