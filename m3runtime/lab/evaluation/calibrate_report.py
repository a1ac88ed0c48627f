"""`calibrate_report`: the results of ``m3 eval calibrate``, the chosen setting and the evidence for it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from m3runtime.config.schema import Config
from m3runtime.lab.evaluation.calibrate import CalibrationResults, CalibrationSettings
from m3runtime.lab.evaluation.choosing import MEMORIES, Pair, Setting, best, choose, crossed, values
from m3runtime.lab.evaluation.plots import Plot, Series
from m3runtime.lab.evaluation.report import Report, Table
from m3runtime.lab.evaluation.statistics import Estimate, mean

_FLOORS_SHOWN = 16

_NOTHING = Setting(1, 2.0, None)
"""A setting that recalls nothing, because no score reaches its floor."""


@dataclass(frozen=True, slots=True)
class Findings:
    """The chosen setting, and the evidence for it."""

    chosen: Setting
    best: Setting
    """The setting with the most likely answers; the chosen one may be simpler."""
    former: Setting
    likelihood: Estimate
    """Log-likelihood of answers under the chosen setting."""
    gain: Estimate
    """Log-likelihood less that under the former setting; each statement is judged by the choice of the others."""
    gain_over_nothing: Estimate
    """Log-likelihood less that of recalling nothing, likewise."""

    def evidence(self, date: str) -> dict[str, str]:
        """The comment for each value in the configuration file."""
        figures = f"log-likelihood {self.likelihood}, {self._against_former()}, {self.likelihood.count} statements"
        former = {name: "null" if value is None else f"{value:g}" for name, value in asdict(self.former).items()}
        return {name: f"{date} was {value}; {figures}" for name, value in former.items()}

    def _against_former(self) -> str:
        if self.gain.high < 0:
            return f"kept: what the rule would choose does {_signed(self.gain)}"
        return f"{_signed(self.gain)} on what it was before"


def findings(results: CalibrationResults, seed: int) -> Findings:
    """The setting chosen by the rule of `m3runtime.lab.evaluation.choosing`, with its evidence."""
    settings, pairs = results.settings, results.pairs
    table, nothing = values(settings, pairs), np.array([pair.nothing for pair in pairs])
    fair = crossed(settings, table, nothing, seed)
    former = settings.index(results.former)
    gain = mean(list(fair - table[former]), seed)
    # The former setting stays if the rule would choose a worse one.
    chosen = former if gain.high < 0 else choose(settings, table, nothing, seed)
    return Findings(
        chosen=settings[chosen],
        best=settings[best(table)],
        former=results.former,
        likelihood=mean(list(table[chosen]), seed),
        gain=gain,
        gain_over_nothing=mean(list(fair - nothing), seed),
    )


def calibrate_report(
    results: CalibrationResults, found: Findings, settings: CalibrationSettings, config: Config
) -> Report:
    """The report: tables, pictures, and a summary in words."""
    by_memories = _by_memories(results, settings.seed)
    return Report(
        title=f"Calibration on {len(results.pairs)} statements of the bank's own references",
        command=settings.command,
        settings=asdict(settings),
        config=config.model_dump(mode="json"),
        fingerprints=results.fingerprints,
        summary=tuple(_summary(results, found)),
        tables=(
            _chosen(results, found, settings.seed),
            _grid(results, found, settings.seed),
            _floors(results, found, settings.seed),
            _retrieval(results, settings.seed),
        ),
        plots=(
            Plot("memories", "The answer's log-likelihood, without floor and margin", "natural log, mean of a token",
                 by_memories, x="memories recalled"),
        ),
        results={
            "chosen": asdict(found.chosen),
            "best": asdict(found.best),
            "former": asdict(found.former),
            "gain": asdict(found.gain),
            "gain_over_nothing": asdict(found.gain_over_nothing),
            "statements": [asdict(statement) for statement in results.statements.made],
            "skipped": results.statements.skipped,
            "pairs": [asdict(pair) for pair in results.pairs],
        },
    )  # fmt: skip


def _summary(results: CalibrationResults, found: Findings) -> list[str]:
    lines = [
        f"Chosen: {found.chosen}. Before: {found.former}.",
        f"The answer's log-likelihood is {found.likelihood} a token, {_signed(found.gain)} on what it was before, "
        f"{_signed(found.gain_over_nothing)} on recalling nothing.",
    ]
    if found.gain.high < 0:
        lines.append("What the rule would choose does worse than what was there, by the gain above: that stays.")
    elif found.gain.low <= 0:
        lines.append(f"{found.gain.count} statements cannot tell this from what it was before.")
    if found.gain_over_nothing.low <= 0:
        lines.append("They cannot tell it from recalling nothing, either: memories may not help this model here.")
    if found.chosen not in (found.best, found.former):
        lines.append(
            f"The most likely answers had {found.best}; the chosen one is simpler, and as good as can be told."
        )
    if results.statements.skipped:
        lines.append(f"{results.statements.skipped} references that were looked at gave no statement.")
    return lines


def _chosen(results: CalibrationResults, found: Findings, seed: int) -> Table:
    rows = [_row("nothing recalled", results.pairs, _NOTHING, seed)]
    named = {"before": found.former, "chosen": found.chosen, "most likely": found.best}
    rows += [_row(f"{name}: {setting}", results.pairs, setting, seed) for name, setting in named.items()]
    return Table(
        "What was chosen",
        ("", "log-likelihood", "known", "unknown", "recalled, known", "recalled, unknown"),
        tuple(rows),
        "Log-likelihood: natural logarithm of the answer's probability, mean over its tokens, then over statements. "
        "Each statement is completed twice: known, with its own reference in the bank, and unknown, without it; the "
        "first column is the mean of both. In brackets, the interval of 95 % of bootstrap resamples of the statements. "
        "The chosen setting is the best of many, which flatters it here; the gains above judge each statement by the "
        "choice of the others.",
    )


def _row(name: str, pairs: Sequence[Pair], setting: Setting, seed: int) -> tuple[object, ...]:
    return (
        name,
        mean([pair.under(setting) for pair in pairs], seed),
        mean([pair.known.under(setting) for pair in pairs], seed),
        mean([pair.unknown.under(setting) for pair in pairs], seed),
        np.mean([setting.recalled(pair.known.nearest) for pair in pairs]).item(),
        np.mean([setting.recalled(pair.unknown.nearest) for pair in pairs]).item(),
    )


def _grid(results: CalibrationResults, found: Findings, seed: int) -> Table:
    """The best floor for each number of memories and margin."""
    table = values(results.settings, results.pairs)
    top = table[results.settings.index(found.best)]
    rows = []
    for memories, margin in dict.fromkeys((setting.memories, setting.margin) for setting in results.settings):
        inside = [
            n for n, setting in enumerate(results.settings) if (setting.memories, setting.margin) == (memories, margin)
        ]
        row = max(inside, key=lambda n: table[n].mean())
        setting = results.settings[row]
        shown = "none" if margin is None else f"{margin:g}"
        against = mean(list(table[row] - top), seed)
        rows.append((memories, shown, f"{setting.min_score:g}", mean(list(table[row]), seed), against))
    return Table(
        "Memories and margin",
        ("memories", "margin", "best min_score", "log-likelihood", "against the most likely"),
        tuple(rows),
    )


def _floors(results: CalibrationResults, found: Findings, seed: int) -> Table:
    """The effect of the floor, with the chosen number of memories and margin."""
    floors = sorted({setting.min_score for setting in results.settings})
    step = max(1, len(floors) // _FLOORS_SHOWN)
    shown = sorted({*floors[::step], found.chosen.min_score, floors[-1]})
    rows = []
    for floor in shown:
        setting = Setting(found.chosen.memories, floor, found.chosen.margin)
        rows.append(_row(f"{floor:g}", results.pairs, setting, seed))
    return Table(
        "The floor",
        ("min_score", "log-likelihood", "known", "unknown", "recalled, known", "recalled, unknown"),
        tuple(rows),
        "Statements are worded as their references are, and are all about what the bank is about: questions in other "
        "words score lower, and what a floor is for, texts that the bank has nothing to say to, is not among them.",
    )


def _retrieval(results: CalibrationResults, seed: int) -> Table:
    made = list(zip(results.statements.made, results.pairs, strict=True))
    rows: list[tuple[object, ...]] = [
        (f"own reference among the {depth} nearest",
         mean([float(one.reference in [match.id for match in pair.known.nearest[:depth]]) for one, pair in made], seed))
        for depth in MEMORIES
    ]  # fmt: skip
    for name, cases in (
        ("known", [pair.known for pair in results.pairs]),
        ("unknown", [pair.unknown for pair in results.pairs]),
    ):
        scores = [case.nearest[0].score for case in cases if case.nearest]
        if scores:
            rows.append((f"score of the nearest, {name}", mean(scores, seed)))
    return Table("Retrieval", ("", ""), tuple(rows))


def _by_memories(results: CalibrationResults, seed: int) -> tuple[Series, Series]:
    settings = [_NOTHING, *(Setting(memories, -1.0, None) for memories in MEMORIES)]
    known = tuple(mean([pair.known.under(setting) for pair in results.pairs], seed) for setting in settings)
    unknown = tuple(mean([pair.unknown.under(setting) for pair in results.pairs], seed) for setting in settings)
    x = (0.0, *map(float, MEMORIES))
    return Series("known", known, x), Series("unknown", unknown, x)


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} ({estimate.low:+.3f} to {estimate.high:+.3f})"
