"""``m3 eval calibrate``: choose the settings of recall on the bank itself."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from m3runtime.cli.options import ConfigFile, Json, Set, load, print_json
from m3runtime.cli.progress import stages

if TYPE_CHECKING:
    from m3runtime.config.schema import Config

_STAGES = {"scores": "Scoring answers"}
_KEYS = ("memories", "min_score", "margin")


def calibrate(
    config: ConfigFile = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for the report and the state of a stopped run."),
    ] = Path("eval-calibrate"),
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the statements.")] = 0,
    statements: Annotated[int, typer.Option("--statements", min=8, help="Number of statements to complete.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Answers in one batch.")] = 8,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the changed file, and do not write it.")] = False,
    set: Set = None,
    json: Json = False,
) -> None:
    """Choose recall.memories, min_score and margin on statements from your bank, and write them into your file.

    It can be stopped at any moment and run again with the same --out: it resumes. The bank is not changed; in the file,
    only these three values change, each with the evidence as a comment.
    """
    loaded = load(config, set)
    from datetime import date

    from m3runtime import assembly
    from m3runtime.config import presets
    from m3runtime.plugins import loading as plugins

    plugins.require("m3 eval", "eval")
    from m3runtime.config.loading import DEFAULT_FILE, FILE_VARIABLE
    from m3runtime.lab.evaluation import yaml_edit
    from m3runtime.lab.evaluation.calibrate import CalibrationSettings, setting_of
    from m3runtime.lab.evaluation.calibrate import calibrate as measure
    from m3runtime.lab.evaluation.calibrate_report import calibrate_report, findings
    from m3runtime.lab.evaluation.choosing import Setting

    file = config or Path(os.environ.get(FILE_VARIABLE) or DEFAULT_FILE)
    today = date.today().isoformat()

    def written(setting: Setting, evidence: Mapping[str, str]) -> str:
        values = {key: getattr(setting, key) for key in _KEYS}
        return yaml_edit.edited(file, values, evidence, lambda copy: _load_without_recall(copy, set))

    # What would fail in the end fails now.
    written(setting_of(loaded.config), dict.fromkeys(_KEYS, today))
    if not dry_run:
        yaml_edit.check_writable(file)
    for key in _KEYS:
        origin = loaded.origins[f"recall.{key}"]
        if origin not in (file.name, "default", presets.ORIGIN):
            typer.echo(f"m3: recall.{key} is set by {origin}, which goes before what the file says", err=True)

    asked = CalibrationSettings(seed=seed, statements=statements, batch=batch)
    with stages(_STAGES, shown=not json) as progress:
        results = measure(loaded.config, asked, out, lambda: assembly.open_adapter(loaded.config), progress)
    found = findings(results, seed)
    command = f"m3 eval calibrate --seed {seed} --statements {statements}"
    report = calibrate_report(results, found, asked, loaded.config, command)
    report.save(out)
    text = written(found.chosen, found.evidence(today))
    if not dry_run:
        yaml_edit.replace(file, text)
    if json:
        print_json({**report.to_json(), "file": str(file), "written": not dry_run, "text": text})
        return
    for line in [*report.summary, str(out / "report.md")]:
        typer.echo(line, err=dry_run)  # standard output is then the file alone
    typer.echo(text if dry_run else f"written into {file}", nl=not dry_run)


def _load_without_recall(file: Path, settings: list[str] | None) -> "Config":
    """A file with all that goes before it, but for recall: what the file says of that is what counts."""
    from m3runtime.config.loading import PREFIX
    from m3runtime.config.schema import Config

    environ = {name: value for name, value in os.environ.items() if not name.startswith(f"{PREFIX}RECALL")}
    overrides = dict(setting.split("=", 1) for setting in settings or () if not setting.startswith("recall"))
    return Config.load(file, environ, overrides)
