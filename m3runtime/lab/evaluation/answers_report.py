"""Answers of an `AnswersRun` as tables, pictures and sentences."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from m3runtime.lab.evaluation.asking import AnswersResults
from m3runtime.lab.evaluation.facts_grounding import FIGURES
from m3runtime.lab.evaluation.modes import MODES, Item, Mode
from m3runtime.lab.evaluation.plots import Plot, Series
from m3runtime.lab.evaluation.report import Table
from m3runtime.lab.evaluation.statistics import Estimate, difference, mean, ratio
from m3runtime.lab.results import Spread

DEPTHS = (1, 2, 3, 5, 8)
"""Numbers of nearest memories that are looked at."""
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


class Figures:
    """The results of one mode, question by question."""

    def __init__(self, results: AnswersResults, mode: Mode, seed: int) -> None:
        answers = results.answers[mode]
        self.seed = seed
        self.items = [item for item in results.items if item.question.answers and item.key in answers]
        """The answerable questions that were asked in this mode."""
        answerable = [answers[item.key] for item in self.items]
        self.right = [float(answer["right"]) for answer in answerable]
        self.log_probs = [fmean(answer["log_probs"]) for answer in answerable]
        self.invented = [
            float(answers[item.key]["invented"])
            for item in results.items
            if not item.question.answers and item.key in answers
        ]

    def exact(self) -> Estimate:
        """The share of answers that have an accepted one."""
        return mean(self.right, self.seed)

    def likelihood(self) -> Estimate:
        """The log-likelihood of right answers."""
        return mean(self.log_probs, self.seed)

    def above(self, other: "Figures") -> Estimate:
        """The log-likelihood of the right answer less that of another mode, in pairs of questions."""
        return difference(self.log_probs, other.log_probs, self.seed)


def answers_table(figures: Mapping[Mode, Figures]) -> Table:
    """A row for each mode."""
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


def ratios_table(figures: Mapping[Mode, Figures]) -> Table:
    """A row for each of `PAIRS` that was asked."""
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


def speed_table(results: AnswersResults) -> Table:
    """A row for each mode that was timed."""
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


def summary(figures: Mapping[Mode, Figures], seed: int) -> list[str]:
    """The findings as sentences."""
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
            f"{name}: {ratio(memory.right, of.right, seed)} times as many. The right answer's log-likelihood "
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


def plots(figures: Mapping[Mode, Figures]) -> tuple[Plot, ...]:
    """Exact answers and likelihoods of all modes."""
    modes = tuple(figures)
    exact = Series("exact", tuple(figures[mode].exact() for mode in modes))
    likely = Series("likelihood", tuple(figures[mode].likelihood() for mode in modes))
    return (
        Plot("exact", "Exact answers", "share of questions", (exact,), modes),
        Plot("likelihood", "The right answer's log-likelihood", "natural log, mean of a token", (likely,), modes),
    )


def described(item: Item) -> dict[str, Any]:
    """A question, and what was found for it, as JSON values."""
    return {
        "asked": item.asked,
        "kind": item.question.kind,
        "answers": item.question.answers,
        "right": item.right,
        "recalled": [asdict(match) for match in item.recalled],
        "nearest": [asdict(match) for match in item.nearest],
    }


def measured(results: AnswersResults) -> dict[str, Any]:
    """The results that depend on the machine, or on who was in a batch."""
    return {
        "timings": [asdict(timing) for timing in results.timings],
        "grounding": {
            key: {name: answer[name] for name in FIGURES if name in answer}
            for key, answer in results.answers.get("memory", {}).items()
        },
    }
