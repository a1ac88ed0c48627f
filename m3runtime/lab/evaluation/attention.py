"""``m3 eval calibrate-attention``: how a model reads memories, brought near to how it reads the same text.

No question and no label is needed. For statements of the bank's own references a model continues the beginning, with
the reference as text in the prompt. The same continuations are then scored from memories. The mean difference of the
two log-likelihoods estimates the divergence (Kullback-Leibler, in nats a token) of answers from memory from answers
from text, because the continuations are drawn from the latter. Axis by axis, the value of least divergence is kept.

Statements are in two halves: values are chosen by the first, and judged by the second.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import Config
from m3runtime.documents.reference import Reference
from m3runtime.errors import InputError
from m3runtime.lab.evaluation.journal import silent
from m3runtime.lab.evaluation.laboratory import Laboratory, weighted
from m3runtime.lab.evaluation.statements import FEWEST, Statement, make_statements
from m3runtime.memory.block import as_ids
from m3runtime.recall.lease import Part
from m3runtime.retrieval.match import Match
from m3runtime.runtime import Runtime
from m3runtime.writing.writer import OnProgress

_TOKENS = 16
"""Most tokens of a continuation."""


@dataclass(frozen=True, slots=True)
class Reading:
    """How attention reads memories."""

    score_temperature: float | None
    """See `RecallConfig`."""
    attention_temperature: float
    """See `MemoryConfig`."""
    attention_weight: float

    @classmethod
    def of(cls, config: Config) -> "Reading":
        """That of a configuration."""
        memory = config.memory
        return cls(config.recall.score_temperature, memory.attention_temperature, memory.attention_weight)

    def into(self, config: Config) -> Config:
        """The configuration with these values."""
        of_memory = {name: value for name, value in asdict(self).items() if name != "score_temperature"}
        recall = config.recall.model_copy(update={"score_temperature": self.score_temperature})
        return config.model_copy(update={"recall": recall, "memory": config.memory.model_copy(update=of_memory)})


AXES: Mapping[str, tuple[Any, ...]] = {
    "attention_weight": (0.5, 0.7, 1.0, 1.4, 2.0, 3.0),
    "attention_temperature": (0.7, 0.8, 0.85, 0.9, 0.95, 1.0, 1.1),
    "score_temperature": (0.01, 0.02, 0.03, 0.05, 0.1, None),
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
class AttentionResults:
    """The results of ``m3 eval calibrate-attention``."""

    former: Reading
    best: Reading
    """The reading of least divergence for the first half of the statements."""
    tried: Mapping[Reading, tuple[float, ...]]
    """The divergence of each statement of the first half."""
    judged: Mapping[Reading, tuple[float, ...]]
    """The divergence of each statement of the second half, under ``former`` and ``best``."""
    fingerprints: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class _Case:
    """A statement with its continuation by a model that reads the reference as text."""

    asked: str
    continuation: str
    log_probs: tuple[float, ...]
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
        made = make_statements(runtime.bank.home, settings.statements, settings.seed).made
        adapter = open_adapter()
        adapter.check(runtime.bank.manifest, runtime.bank.path)
        cases = _continued(adapter, runtime, made, settings, progress)
        scorer = _Scorer(adapter, runtime, settings.batch, cases)
        middle = len(cases) // 2
        former = best = Reading.of(config)
        tried: dict[Reading, tuple[float, ...]] = {}
        steps = 1 + sum(map(len, AXES.values()))

        def mean_of(reading: Reading) -> float:
            if reading not in tried:
                progress("Trying values", len(tried), max(steps, len(tried)))
                tried[reading] = scorer.divergences(cases[:middle], reading)
            return float(np.mean(tried[reading]))

        for name, values in AXES.items():
            best = min([best, *(replace(best, **{name: value}) for value in values)], key=mean_of)
        judged = {reading: scorer.divergences(cases[middle:], reading) for reading in dict.fromkeys((former, best))}
        return AttentionResults(former, best, tried, judged, runtime.bank.manifest.fingerprints())


def _continued(
    adapter: Adapter,
    runtime: Runtime,
    made: Sequence[Statement],
    settings: AttentionSettings,
    progress: OnProgress,
) -> list[_Case]:
    """The statements that a model continues, each with its own reference alone as text in the prompt."""
    form = runtime.config.generate.prompt
    drawing = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": settings.seed, "max_new_tokens": _TOKENS}
    generate = runtime.config.generate.model_copy(update=drawing)
    chosen = runtime.search([one.prompt for one in made])
    cases = []
    for start in range(0, len(made), settings.batch):
        progress("Continuing statements", start, len(made))
        some = made[start : start + settings.batch]
        owns = runtime.references([statement.reference for statement in some])
        prompts = [
            adapter.render(statement.prompt, form, [] if own is None else [own.headed])
            for statement, own in zip(some, owns, strict=True)
        ]
        texts = [answer.text for answer in adapter.generate(prompts, None, generate)]
        told = [row for row, text in enumerate(texts) if text.strip() and adapter.count_tokens(text)]
        scores = adapter.score([prompts[row] for row in told], [texts[row] for row in told], None)
        for row, score in zip(told, scores, strict=True):
            cases.append(_Case(some[row].prompt, texts[row], score.log_probs, tuple(chosen[start + row])))
    if len(cases) < FEWEST:
        raise InputError(f"the model continues {len(cases)} statements of this bank, and at least {FEWEST} are needed")
    return cases


class _Scorer:
    """Scores continuations from memories, under any reading."""

    def __init__(self, adapter: Adapter, runtime: Runtime, batch: int, cases: Sequence[_Case]) -> None:
        self._adapter = adapter
        self._config = runtime.config
        self._batch = batch
        ids = sorted({match.id for case in cases for match in case.nearest})
        self._parts: Mapping[int, Part] = runtime.fetch(as_ids(ids), adapter.dtype)
        self._references: Mapping[int, Reference] = {
            id: one for id, one in zip(ids, runtime.references(ids), strict=True) if one is not None
        }

    def divergences(self, cases: Sequence[_Case], reading: Reading) -> tuple[float, ...]:
        """The mean difference of log-likelihoods, from text less from memory, of each continuation's tokens."""
        config = reading.into(self._config)
        adapter = self._adapter.with_memory(config.memory)
        choices = {
            case.asked: weighted(
                [match for match in case.nearest if match.id in self._parts], reading.score_temperature
            )
            for case in cases
        }
        laboratory = Laboratory(config, adapter.spec, self._parts, self._references, choices)
        found = []
        for start in range(0, len(cases), self._batch):
            some = cases[start : start + self._batch]
            prompts = [adapter.render(case.asked, config.generate.prompt) for case in some]
            with ExitStack() as closing:
                streams = [closing.enter_context(laboratory.stream(adapter.dtype)) for _ in some]
                scores = adapter.score(prompts, [case.continuation for case in some], streams)
            found += [
                float(np.mean(np.subtract(case.log_probs, score.log_probs)))
                for case, score in zip(some, scores, strict=True)
            ]
        return tuple(found)
