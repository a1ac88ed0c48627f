"""``m3 eval calibrate-attention``: how attention reads memories, so that what a bank says becomes likely.

No question and no label is needed. Statements of the bank's own references are cut before a number, a name or their
last word. A model reads the beginning as it reads a question, with the memories that a search finds, and what follows
in the reference is the right answer. Axis by axis, the value that makes right answers likeliest is taken, if statements
that did not choose it can tell it from the value before: each half of them is scored by what the other half chooses.

Only statements whose own reference is found first count, as a question names what it asks for and many a statement says
``it``: where another memory is first, the best value is the one that reads least of it. So statements cannot choose how
memories are weighed against one another, ``recall.score_temperature``.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace

import numpy as np

from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Reference
from m3runtime.errors import InputError
from m3runtime.lab.evaluation.journal import silent
from m3runtime.lab.evaluation.laboratory import Laboratory, weighted
from m3runtime.lab.evaluation.statements import FEWEST, make_statements
from m3runtime.lab.evaluation.statistics import Estimate, difference
from m3runtime.memory.block import as_ids
from m3runtime.recall.lease import Part
from m3runtime.retrieval.match import Match
from m3runtime.runtime import Runtime
from m3runtime.writing.writer import OnProgress

_SPARE = 4
"""Times as many statements that are made as are wanted, since a search does not find the reference of each first."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How attention reads memories; see `MemoryConfig`."""

    attention_temperature: float
    attention_weight: float

    @classmethod
    def of(cls, config: Config) -> "Reading":
        """That of a configuration."""
        return cls(config.memory.attention_temperature, config.memory.attention_weight)

    def into(self, config: Config) -> Config:
        """The configuration with these values."""
        return config.model_copy(update={"memory": config.memory.model_copy(update=asdict(self))})


AXES: Mapping[str, tuple[float, ...]] = {
    "attention_temperature": (0.7, 0.8, 0.9, 1.0, 1.1),
    "attention_weight": (0.5, 0.7, 1.0, 1.4, 2.0),
}
"""The values that are tried, in this order."""


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """The settings of ``m3 eval calibrate-attention``."""

    seed: int = 0
    statements: int = 64
    batch: int = 16

    @property
    def command(self) -> str:
        """The command that has these settings."""
        return f"m3 eval calibrate-attention --seed {self.seed} --statements {self.statements}"


@dataclass(frozen=True, slots=True)
class Step:
    """What one axis came to."""

    axis: str
    by_halves: tuple[Reading, Reading]
    """The readings that the first and the second half of the statements choose."""
    by_all: Reading
    gained: Estimate
    """Log-likelihood of each half with what the other chooses, more than with the reading before."""
    kept: Reading
    """``by_all`` if the gain is told from 0, else the reading before."""


@dataclass(frozen=True, slots=True)
class AttentionResults:
    """The results of ``m3 eval calibrate-attention``."""

    former: Reading
    advised: Reading
    steps: tuple[Step, ...]
    """One for each of `AXES`, in order."""
    tried: Mapping[Reading, tuple[float, ...]]
    """The log-likelihood of each statement's answer, mean over its tokens."""
    fingerprints: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Case:
    """A statement whose own reference is the nearest of what a search finds for it."""

    asked: str
    answer: str
    nearest: tuple[Match, ...]


def calibrate_attention(
    config: Config, settings: AttentionSettings, open_adapter: Callable[[], Adapter], progress: OnProgress = silent
) -> AttentionResults:
    """Try readings on the configured bank, which is not changed. ``open_adapter`` is called if the bank is usable.

    Raises `InputError` if the bank gives too few statements.
    """
    if settings.statements < 2 * FEWEST:
        raise InputError(f"statements: at least {2 * FEWEST} are needed, or nothing can be told")
    with Runtime.open(config.without_cold_start(), read_only=True) as runtime:
        cases = _cases(runtime, settings)
        adapter = open_adapter()
        adapter.check(runtime.bank.manifest, runtime.bank.path)
        scorer = _Scorer(adapter, runtime, settings.batch, cases)
        former = Reading.of(config)
        tried: dict[Reading, tuple[float, ...]] = {}
        steps = 1 + sum(map(len, AXES.values()))

        def values_of(reading: Reading) -> Sequence[float]:
            if reading not in tried:
                progress("Trying values", len(tried), max(steps, len(tried)))
                tried[reading] = scorer.likelihoods(cases, reading)
            return tried[reading]

        def walked(axis: str, before: Reading) -> Step:
            options = [before, *(replace(before, **{axis: value}) for value in AXES[axis])]
            first, second, by_all = (
                max(options, key=lambda reading: float(np.mean(values_of(reading)[some]))) for some in (*halves, all_of)
            )
            crossed = [*values_of(second)[halves[0]], *values_of(first)[halves[1]]]
            gained = difference(crossed, values_of(before), settings.seed)
            return Step(axis, (first, second), by_all, gained, by_all if gained.low > 0 else before)

        halves, all_of = (slice(len(cases) // 2), slice(len(cases) // 2, None)), slice(None)
        walk: list[Step] = []
        for axis in AXES:
            walk.append(walked(axis, walk[-1].kept if walk else former))
        fingerprints = runtime.bank.manifest.fingerprints()
        return AttentionResults(former, walk[-1].kept, tuple(walk), tried, fingerprints)


def _cases(runtime: Runtime, settings: AttentionSettings) -> list[_Case]:
    made = make_statements(runtime.bank.home, _SPARE * settings.statements, settings.seed).made
    found = runtime.search([statement.prompt for statement in made])
    cases = [
        _Case(statement.prompt, statement.answer, tuple(matches))
        for statement, matches in zip(made, found, strict=True)
        if matches and matches[0].id == statement.reference
    ]
    if len(cases) < 2 * FEWEST:
        raise InputError(
            f"a search finds the own reference of {len(cases)} of this bank's {len(made)} statements first, and at "
            f"least {2 * FEWEST} are needed; write more references into it"
        )
    return cases[: settings.statements]


class _Scorer:
    """Scores answers from memories, under any reading."""

    def __init__(self, adapter: Adapter, runtime: Runtime, batch: int, cases: Sequence[_Case]) -> None:
        self._adapter = adapter
        self._config = runtime.config
        self._batch = batch
        ids = sorted({match.id for case in cases for match in case.nearest})
        self._parts: Mapping[int, Part] = runtime.fetch(as_ids(ids), adapter.dtype)
        self._references: Mapping[int, Reference] = {
            id: one for id, one in zip(ids, runtime.references(ids), strict=True) if one is not None
        }

    def likelihoods(self, cases: Sequence[_Case], reading: Reading) -> tuple[float, ...]:
        """The log-likelihood of each right answer, mean over its tokens."""
        config = reading.into(self._config)
        adapter = self._adapter.with_memory(config.memory)
        choices = {
            case.asked: weighted(
                [match for match in case.nearest if match.id in self._parts], config.recall.score_temperature
            )
            for case in cases
        }
        laboratory = Laboratory(config, adapter.spec, self._parts, self._references, choices)
        found: list[float] = []
        for start in range(0, len(cases), self._batch):
            some = cases[start : start + self._batch]
            prompts = [adapter.render(case.asked, config.generate.prompt) for case in some]
            with ExitStack() as closing:
                streams = [closing.enter_context(laboratory.stream(adapter.dtype)) for _ in some]
                scores = adapter.score(prompts, [case.answer for case in some], streams)
            found += [float(np.mean(score.log_probs)) for score in scores]
        return tuple(found)
