"""`choose`: ``recall.memories``, ``min_score`` and ``margin`` that make the answers of statements most likely.

The rule:

1. The value of a setting is the log-likelihood of an answer, per token, averaged over two cases (the bank knows the
   statement, and it does not) and over statements.
2. The best setting is the one with the highest value.
3. A simpler one is taken instead, fewer memories first and then without margin, where the statements cannot tell it
   from the best (the paired bootstrap interval of the difference holds 0) and it keeps at least `KEPT` of what the
   best gains over recalling nothing. The second condition keeps few statements, which can tell little apart, from
   choosing next to nothing.
4. Of equally simple settings it is the best one, but with the highest floor that costs at most `SPENT` of that gain.
   Every statement is about what the bank is about, even one that it does not know, so statements show what a floor
   costs and hardly what it is for: texts that the bank has nothing to say to. It is not raised further, as statements
   are worded as their references are, and real questions score lower.

The choice is the best of very many, so its own value flatters it. `crossed` judges each statement by the choice of the
others; what was in force before stays if it does significantly better than that.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from m3runtime.lab.evaluation.statistics import mean
from m3runtime.retrieval.match import Match
from m3runtime.retrieval.retriever import passing

MEMORIES = (1, 2, 3, 5, 8)
"""Numbers of memories to try."""
KEPT = 0.98
SPENT = 0.01
FOLDS = 8
_FLOORS = 24
_GAPS = (0.25, 0.5, 0.75)
_DIGITS = 3

Values = npt.NDArray[np.float64]
"""Log-likelihoods, ``[settings, statements]``."""


@dataclass(frozen=True, slots=True)
class Setting:
    """The values to choose, as in the section ``recall`` of the configuration."""

    memories: int
    min_score: float
    margin: float | None

    def recalled(self, nearest: Sequence[Match]) -> int:
        """The number of memories that are recalled, of the nearest, best first."""
        return len(passing(nearest[: self.memories], min_score=self.min_score, margin=self.margin))

    def __str__(self) -> str:
        margin = "no margin" if self.margin is None else f"margin {self.margin:g}"
        return f"memories {self.memories}, min_score {self.min_score:g}, {margin}"


@dataclass(frozen=True, slots=True)
class Case:
    """A statement with its nearest memories."""

    nearest: tuple[Match, ...]
    """Best first."""
    log_likelihood: Mapping[int, float]
    """Log-likelihood of the answer, per token, by the number of recalled memories."""

    def under(self, setting: Setting) -> float:
        """The log-likelihood of the answer under a setting."""
        return self.log_likelihood[setting.recalled(self.nearest)]


@dataclass(frozen=True, slots=True)
class Pair:
    """A statement in two cases: with its reference in the bank, and without."""

    known: Case
    unknown: Case

    def under(self, setting: Setting) -> float:
        """The value of a setting for this statement, by rule 1."""
        return (self.known.under(setting) + self.unknown.under(setting)) / 2

    @property
    def nothing(self) -> float:
        """The value if nothing is recalled."""
        return (self.known.log_likelihood[0] + self.unknown.log_likelihood[0]) / 2


def grid(nearest: Iterable[Sequence[Match]], former: Setting) -> list[Setting]:
    """The settings to choose from, simplest first, with ``former`` among them.

    Floors and margins are quantiles of the scores, so that they suit any embedder.
    """
    found = [[match.score for match in matches] for matches in nearest if matches]
    every = [score for scores in found for score in scores]
    best = [scores[0] for scores in found]
    gaps = [scores[0] - score for scores in found for score in scores[1:]]
    floors = {-1.0, 1.0, former.min_score}  # everything, nothing
    margins = {former.margin} - {None}
    for scores, count in ((best, _FLOORS), (every, _FLOORS // 2)):
        if scores:
            seen = np.unique(np.quantile(scores, np.linspace(0, 1, count), method="lower"))
            floors.update(_rounded(np.concatenate([seen, (seen[1:] + seen[:-1]) / 2])))
    if gaps:
        margins.update(margin for margin in _rounded(np.quantile(gaps, _GAPS)) if margin > 0)
    return [
        Setting(memories, floor, margin)
        for memories in sorted({*MEMORIES, former.memories})
        for margin in (None, *sorted(margin for margin in margins if margin is not None))
        for floor in sorted(floors)
    ]


def values(settings: Sequence[Setting], pairs: Sequence[Pair]) -> Values:
    """The value of each setting for each statement."""
    return np.array([[pair.under(setting) for pair in pairs] for setting in settings], np.float64)


def best(values: Values) -> int:
    """The place of the best setting; the simplest of equal ones."""
    return int(values.mean(1).argmax())


def choose(settings: Sequence[Setting], values: Values, nothing: npt.NDArray[np.float64], seed: int = 0) -> int:
    """The place of the chosen setting, by the rule of this module.

    ``settings`` are as `grid` orders them, and ``nothing`` holds each statement's value with nothing recalled.
    """
    means = values.mean(1)
    top = best(values)
    gain = max(0.0, float(means[top] - nothing.mean()))
    for kind in sorted({_kind(setting) for setting in settings}):
        rows = [row for row, setting in enumerate(settings) if _kind(setting) == kind]
        row = max(rows, key=lambda row: means[row])
        cheap = [
            other
            for other in rows
            if settings[other].margin == settings[row].margin and means[other] >= means[row] - SPENT * gain
        ]
        taken = max(cheap, key=lambda row: settings[row].min_score)
        kept = means[taken] - nothing.mean() >= KEPT * gain
        if kind == _kind(settings[top]) or (kept and mean(list(values[top] - values[taken]), seed).low <= 0):
            return taken
    return top


def crossed(
    settings: Sequence[Setting], values: Values, nothing: npt.NDArray[np.float64], seed: int = 0
) -> npt.NDArray[np.float64]:
    """Each statement's value under the setting that the statements of the other folds choose."""
    folds = np.arange(values.shape[1]) % FOLDS
    result = np.empty(values.shape[1])
    for fold in set(folds.tolist()):
        inside = folds == fold
        row = choose(settings, values[:, ~inside], nothing[~inside], seed)
        result[inside] = values[row, inside]
    return result


def _kind(setting: Setting) -> tuple[int, bool]:
    """A sort key: equal for equally simple settings, smaller for simpler ones."""
    return setting.memories, setting.margin is not None


def _rounded(scores: npt.NDArray[np.float64]) -> list[float]:
    """Scores rounded down, so that the score itself passes."""
    scale = 10**_DIGITS
    return [float(score) for score in np.unique(np.clip(np.floor(scores * scale) / scale, -1, 1))]
