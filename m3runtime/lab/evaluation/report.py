"""`Report`: the results of an evaluation as files: ``report.json``, ``report.md`` and pictures."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from m3runtime.lab.evaluation.plots import Plot, draw
from m3runtime.lab.evaluation.statistics import Estimate
from m3runtime.lab.results import environment, plain
from m3runtime.memory.spec import canonical_json
from m3runtime.storage.files import write_atomically


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text, numbers and estimates under named columns."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[object, ...], ...]
    note: str = ""
    """Explanation of the columns."""

    def __post_init__(self) -> None:
        if any(len(row) != len(self.columns) for row in self.rows):
            raise ValueError(f"{self.title}: every row must have {len(self.columns)} cells")


@dataclass(frozen=True, slots=True)
class Report:
    """The results of one evaluation, and everything that is needed to repeat it."""

    title: str
    command: str
    """The command that makes this report."""
    settings: Mapping[str, Any]
    """The settings of the evaluation, with the seed."""
    config: Mapping[str, Any]
    """The configuration in force."""
    fingerprints: Mapping[str, str]
    """Fingerprints of the model, the tokenizer, the embedder, the codec and the bank."""
    summary: tuple[str, ...]
    """The findings in plain words, also the unfavourable ones."""
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...]
    results: Mapping[str, Any]
    """Every single result; equal for equal seeds and software."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """Results that depend on the machine: times and rates."""

    def save(self, folder: Path) -> None:
        """Write ``report.json``, ``report.md`` and each plot as PNG and SVG; each file is replaced atomically."""
        folder.mkdir(parents=True, exist_ok=True)
        for plot in self.plots:
            draw(plot, folder)
        write_atomically(folder / "report.md", self.markdown().encode())
        results = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / "report.json", results.encode())

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values. Two runs of one seed differ only in ``measured`` and ``environment``."""
        return {
            "title": self.title,
            "command": self.command,
            "settings": plain(self.settings),
            "config": plain(self.config),
            "fingerprints": plain(self.fingerprints),
            "summary": list(self.summary),
            "tables": [plain(table) for table in self.tables],
            "results": plain(self.results),
            "measured": plain(self.measured),
            "environment": environment(),
        }

    def markdown(self) -> str:
        """The report as Markdown."""
        lines = [f"# {self.title}", "", f"Made by `{self.command}`.", ""]
        lines += [f"- {line}" for line in self.summary]
        for table in self.tables:
            lines += ["", f"## {table.title}", "", *markdown_table(table)]
        for plot in self.plots:
            lines += ["", f"![{plot.title}]({plot.name}.png)"]
        lines += ["", "## To repeat it", "", "| | |", "|---|---|"]
        facts = {**self.settings, **self._in_force(), **self.fingerprints, **environment()}
        lines += [f"| {name} | {_cell(value)} |" for name, value in facts.items()]
        lines += ["", "The configuration in force and every single result are in `report.json`.", ""]
        return "\n".join(lines)

    def _in_force(self) -> dict[str, str]:
        """The sections of the configuration that affect answers, without paths."""
        sections = ("memory", "codec", "recall", "generate")
        return {name: canonical_json(self.config[name]) for name in sections if name in self.config}


def markdown_table(table: Table) -> list[str]:
    """A table as lines of Markdown."""
    lines = [f"| {' | '.join(table.columns)} |", "|" + "---|" * len(table.columns)]
    lines += [f"| {' | '.join(_cell(cell) for cell in row)} |" for row in table.rows]
    return [*lines, "", table.note] if table.note else lines


def _cell(value: object) -> str:
    if isinstance(value, Estimate):
        return str(value)
    if isinstance(value, float):
        return f"{value:.3f}"
    return str(value).replace("|", "\\|").replace("\n", " ")
