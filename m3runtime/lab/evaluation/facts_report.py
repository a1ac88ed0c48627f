"""`facts_report`: the results of ``m3 eval facts`` as a report."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from m3runtime import assembly
from m3runtime.config.schema import Config
from m3runtime.lab.evaluation.facts import FactsResults, FactsRun, FactsSettings
from m3runtime.lab.evaluation.facts_grounding import FIGURES, grounding_table, without_figures
from m3runtime.lab.evaluation.journal import silent
from m3runtime.lab.evaluation.modes import MODES, Mode
from m3runtime.lab.evaluation.plots import Plot, Series
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.lab.evaluation.statistics import Estimate, difference, mean, ratio
from m3runtime.lab.results import Spread
from m3runtime.writing.writer import OnProgress

DEPTHS = (1, 2, 3, 5, 8)
PAIRS: tuple[tuple[Mode, Mode], ...] = (
    ("memory", "text"),
    ("memory", "text-5"),
    ("memory", "text-1"),
    ("memory", "none"),
    ("memory-oracle", "text-oracle"),
)
"""Pairs of modes that the report compares."""
BASELINES: dict[Mode, str] = {
    "text": "the same references as text",
    "text-5": "the 5 nearest as text",
    "text-1": "the nearest alone as text",
}


def evaluate_facts(config: Config, settings: FactsSettings, folder: Path, progress: OnProgress = silent) -> Report:
    """Run the evaluation in a folder, or resume it; see `FactsRun`."""
    run = FactsRun(config, settings, folder)
    return facts_report(run.run(assembly.open_adapter(config), progress), settings, run.config)


def facts_report(results: FactsResults, settings: FactsSettings, config: Config) -> Report:
    """The report: tables, pictures, and a summary in words."""
    figures = {mode: _Figures(results, mode, settings.seed) for mode in results.answers}
    tables = [_answers(figures), _ratios(figures), _retrieval(results, settings.seed)]
    if "memory" in figures and (read := grounding_table(results.items, results.answers["memory"], settings.seed)):
        tables.append(read)
    return Report(
        title=f"Facts: {settings.questions} {settings.ask} over {settings.references} references",
        command=settings.command,
        settings=asdict(settings),
        config=config.model_dump(mode="json"),
        fingerprints=results.fingerprints,
        summary=tuple(_summary(figures, settings)),
        tables=(*tables, _speed(results)),
        plots=_plots(figures),
        results={
            "questions": {item.key: _described(item) for item in results.items},
            "answers": without_figures(results.answers),
        },
        measured={
            "timings": [asdict(timing) for timing in results.timings],
            "grounding": {
                key: {name: answer[name] for name in FIGURES if name in answer}
                for key, answer in results.answers.get("memory", {}).items()
            },
        },
    )


class _Figures:
    """The results of one mode, question by question."""

    def __init__(self, results: FactsResults, mode: Mode, seed: int) -> None:
        answers = results.answers[mode]
        self.seed = seed
        answerable = [answers[item.key] for item in results.items if item.right is not None]
        self.right = [float(answer["right"]) for answer in answerable]
        self.log_probs = [fmean(answer["log_probs"]) for answer in answerable]
        self.invented = [
            float(answers[item.key]["invented"]) for item in results.items if item.right is None and item.key in answers
        ]

    def exact(self) -> Estimate:
        return mean(self.right, self.seed)

    def likelihood(self) -> Estimate:
        return mean(self.log_probs, self.seed)

    def above(self, other: "_Figures") -> Estimate:
        """The log-likelihood of the right answer less that of another mode, in pairs of questions."""
        return difference(self.log_probs, other.log_probs, self.seed)


def _answers(figures: dict[Mode, _Figures]) -> Table:
    rows = []
    for mode, of in figures.items():
        invented = mean(of.invented, of.seed) if of.invented else "-"
        rows.append((mode, MODES[mode], of.exact(), of.likelihood(), invented))
    return Table(
        "Answers",
        ("mode", "what the model is given", "exact answers", "log-likelihood of the right answer", "invented answers"),
        tuple(rows),
        "Exact: the answer occurs as whole words. Log-likelihood: natural logarithm, mean over the answer's tokens, "
        "then over questions. Invented: of the questions whose answer is nowhere, the share that is answered without "
        "owning up to not knowing. In brackets, the interval of 95 % of bootstrap resamples of the questions.",
    )


def _ratios(figures: dict[Mode, _Figures]) -> Table:
    rows = []
    for ours, theirs in PAIRS:
        a, b = figures.get(ours), figures.get(theirs)
        if a is not None and b is not None:
            rows.append((f"{ours} against {theirs}", ratio(a.right, b.right, a.seed), a.above(b)))
    return Table(
        "Memory against text",
        ("", "exact answers, ratio", "log-likelihood, difference"),
        tuple(rows),
        "Resampled in pairs: both modes answer the same questions.",
    )


def _retrieval(results: FactsResults, seed: int) -> Table:
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


def _speed(results: FactsResults) -> Table:
    tiers = list(results.timings[0].bytes) if results.timings else []
    rows = []
    for mode in results.answers:
        timings = [timing for timing in results.timings if timing.mode == mode]
        if timings:
            read = [f"{fmean(timing.bytes[tier] for timing in timings):,.0f}" for tier in tiers]
            first = _spread([timing.first_token_s for timing in timings])
            rates = _spread([timing.tokens_per_s for timing in timings if timing.tokens_per_s])  # one token has none
            rows.append((mode, first, rates, *read))
    return Table(
        "Speed",
        ("mode", "time to first token, s", "tokens/s", *(f"bytes read from {tier}" for tier in tiers)),
        tuple(rows),
        f"Median and quartiles of {len(results.timings) // max(1, len(rows))} questions, each put alone, the modes in "
        "turn; search is counted. Bytes: mean of a question; caching tiers are empty at first, and the modes share "
        "them, so what memory has lifted memory-oracle finds there.",
    )


def _spread(figures: Sequence[float]) -> str:
    return Spread.of(figures).show(3) if figures else "-"


def _summary(figures: dict[Mode, _Figures], settings: FactsSettings) -> list[str]:
    lines: list[str] = []
    memory = figures.get("memory")
    if memory is None:
        return lines
    for theirs, name in BASELINES.items():
        of = figures.get(theirs)
        if of is None:
            continue
        gained = memory.above(of)
        lines.append(
            f"Exact answers: {sum(memory.right):.0f} of {len(memory.right)} from memory, {sum(of.right):.0f} with "
            f"{name}: {ratio(memory.right, of.right, settings.seed)} times as many. The right answer's log-likelihood "
            f"is {abs(gained.value):.3f} {'higher' if gained.value > 0 else 'lower'} "
            f"({gained.low:.3f} to {gained.high:.3f}) from memory."
        )
    text = figures.get("text")
    if text is not None and memory.invented:
        lines.append(
            f"Of {len(memory.invented)} questions whose answer is nowhere, {sum(memory.invented):.0f} got an invented "
            f"answer from memory, {sum(text.invented):.0f} with the same references as text."
        )
    return lines


def _plots(figures: dict[Mode, _Figures]) -> tuple[Plot, ...]:
    modes = tuple(figures)
    exact = Series("exact", tuple(figures[mode].exact() for mode in modes))
    likely = Series("likelihood", tuple(figures[mode].likelihood() for mode in modes))
    return (
        Plot("exact", "Exact answers", "share of questions", (exact,), modes),
        Plot("likelihood", "The right answer's log-likelihood", "natural log, mean of a token", (likely,), modes),
    )


def _described(item: Any) -> dict[str, Any]:
    return {
        "asked": item.asked,
        "kind": item.question.kind,
        "answers": item.question.answers,
        "right": item.right,
        "recalled": [asdict(match) for match in item.recalled],
        "nearest": [asdict(match) for match in item.nearest],
    }
