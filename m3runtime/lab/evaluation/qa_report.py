"""`evaluate_qa`: the results of ``m3 eval qa`` as a report."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.lab.evaluation.answers_report import (
    DEPTHS,
    PAIRS,
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
from m3runtime.lab.evaluation.facts_grounding import grounding_table, without_figures
from m3runtime.lab.evaluation.journal import silent
from m3runtime.lab.evaluation.judging import f1, is_exact
from m3runtime.lab.evaluation.modes import Mode
from m3runtime.lab.evaluation.qa import Evidence, QaRun, QaSettings
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.lab.evaluation.statistics import difference, mean
from m3runtime.writing.writer import OnProgress


def evaluate_qa(config: Config, settings: QaSettings, folder: Path, progress: OnProgress = silent) -> Report:
    """Run the evaluation in a folder, or resume it; see `QaRun`."""
    run = QaRun(config, settings, folder)
    return qa_report(run.run(assembly.open_adapter(run.config), progress), run.evidence, settings, run.config)


def qa_report(
    results: AnswersResults, evidence: Mapping[str, Evidence], settings: QaSettings, config: Config
) -> Report:
    """The report: tables, pictures, and a summary in words."""
    figures = {mode: Figures(results, mode, settings.seed) for mode in results.answers}
    words = {mode: _Words(results, mode, figures[mode]) for mode in figures}
    tables = [
        answers_table(figures),
        _words_table(words, evidence, settings.seed),
        ratios_table(figures),
        _against(words, settings.seed),
        _retrieval(results, evidence, settings.seed),
    ]
    if "memory" in figures:
        answers, floor = results.answers["memory"], config.generate.grounding_floor
        read = grounding_table(results.items, answers, settings.seed, floor)
        tables += [read] if read else []
    return Report(
        title=f"{len(results.items)} questions of {Path(settings.file).name}",
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


class _Words:
    """How near the words of the answers in one mode come to accepted ones, question by question."""

    def __init__(self, results: AnswersResults, mode: Mode, figures: Figures) -> None:
        told = [(item, results.answers[mode][item.key]["text"]) for item in figures.items]
        self.keys = [item.key for item in figures.items]
        self.recalled = {item.key: {match.id for match in item.recalled} for item in figures.items}
        self.right = figures.right
        self.exact = [float(is_exact(text, item.question.answers)) for item, text in told]
        self.f1 = [f1(text, item.question.answers) for item, text in told]


def _words_table(words: Mapping[Mode, _Words], evidence: Mapping[str, Evidence], seed: int) -> Table:
    rows = []
    for mode, of in words.items():
        known = [
            right for key, right in zip(of.keys, of.right, strict=True) if evidence[key].holding & of.recalled[key]
        ]
        rows.append((mode, len(of.keys), mean(of.exact, seed), mean(of.f1, seed), mean(known, seed) if known else "-"))
    return Table(
        "Words of the answers",
        ("mode", "questions", "exact match", "F1", "exact answers where a recalled text has the answer"),
        tuple(rows),
        "Exact match and F1 as in SQuAD: words in lower case, without punctuation and articles, against the nearest "
        "accepted answer. A mode with the right reference alone has the questions for which it is known.",
    )


def _against(words: Mapping[Mode, _Words], seed: int) -> Table:
    rows = [
        (f"{ours} against {theirs}", difference(words[ours].exact, words[theirs].exact, seed),
         difference(words[ours].f1, words[theirs].f1, seed))
        for ours, theirs in PAIRS
        if ours in words and theirs in words
    ]  # fmt: skip
    return Table("Words, memory against text", ("", "exact match, difference", "F1, difference"), tuple(rows))


def _retrieval(results: AnswersResults, evidence: Mapping[str, Evidence], seed: int) -> Table:
    items = [(item, evidence[item.key]) for item in results.items if item.question.answers]
    rows: list[tuple[object, ...]] = []
    for depth in DEPTHS:
        near = [({match.id for match in item.nearest[:depth]}, of) for item, of in items]
        has = mean([float(bool(ids & of.holding)) for ids, of in near], seed)
        named = [float(all(ids & some for some in of.named)) for ids, of in near if of.named]
        rows.append((f"{depth} nearest", has, mean(named, seed) if named else "-"))
    recalled = [({match.id for match in item.recalled}, of) for item, of in items]
    named = [float(all(ids & some for some in of.named)) for ids, of in recalled if of.named]
    has = mean([float(bool(ids & of.holding)) for ids, of in recalled], seed)
    rows.append(("recalled", has, mean(named, seed) if named else "-"))
    rows.append(("memories recalled", mean([len(ids) for ids, _ in recalled], seed), "-"))
    return Table(
        "Retrieval",
        ("", "a text among them has an accepted answer", "all texts that the file names are among them"),
        tuple(rows),
    )
