"""`facts_report`: the results of ``m3 eval facts`` as a report."""

from dataclasses import asdict
from pathlib import Path

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.lab.evaluation.answers_report import (
    DEPTHS,
    Figures,
    answers_table,
    described,
    measured,
    plots,
    ratios_table,
    speed_table,
    summary,
)
from m3runtime.lab.evaluation.asking import AnswersResults
from m3runtime.lab.evaluation.facts import FactsRun, FactsSettings
from m3runtime.lab.evaluation.facts_grounding import grounding_table, without_figures
from m3runtime.lab.evaluation.journal import silent
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.lab.evaluation.statistics import mean
from m3runtime.writing.writer import OnProgress


def evaluate_facts(config: Config, settings: FactsSettings, folder: Path, progress: OnProgress = silent) -> Report:
    """Run the evaluation in a folder, or resume it; see `FactsRun`."""
    run = FactsRun(config, settings, folder)
    return facts_report(run.run(assembly.open_adapter(config), progress), settings, run.config)


def facts_report(results: AnswersResults, settings: FactsSettings, config: Config) -> Report:
    """The report: tables, pictures, and a summary in words."""
    figures = {mode: Figures(results, mode, settings.seed) for mode in results.answers}
    tables = [answers_table(figures), ratios_table(figures), _retrieval(results, settings.seed)]
    if "memory" in figures:
        answers, floor = results.answers["memory"], config.generate.grounding_floor
        read = grounding_table(results.items, answers, settings.seed, floor)
        tables += [read] if read else []
    return Report(
        title=f"Facts: {settings.questions} {settings.ask} over {settings.references} references",
        command=settings.command,
        settings=asdict(settings),
        config=config.model_dump(mode="json"),
        fingerprints=results.fingerprints,
        summary=tuple(summary(figures, settings.seed)),
        tables=(*tables, speed_table(results)),
        plots=plots(figures),
        results={
            "questions": {item.key: described(item) for item in results.items},
            "answers": without_figures(results.answers),
        },
        measured=measured(results),
    )


def _retrieval(results: AnswersResults, seed: int) -> Table:
    items = [item for item in results.items if item.right is not None]
    rows: list[tuple[object, ...]] = [
        (f"right reference among the {depth} nearest",
         mean([float(item.right in [match.id for match in item.nearest[:depth]]) for item in items], seed))
        for depth in DEPTHS
    ]  # fmt: skip
    among = [float(item.right in [match.id for match in item.recalled]) for item in items]
    rows.append(("right reference among those recalled", mean(among, seed)))
    rows.append(("memories recalled for a question", mean([len(item.recalled) for item in items], seed)))
    nowhere = [len(item.recalled) for item in results.items if item.right is None]
    if nowhere:
        rows.append(("memories recalled for a question whose answer is nowhere", mean(nowhere, seed)))
    return Table("Retrieval", ("", ""), tuple(rows))
