"""``m3 eval sweep``: try one setting after the other, and keep the best value for the next ones.

The rule: axes are visited in order. On each, every option is tried together with the options kept so far.

1. Exact answers are what a user sees, but they hardly show small differences. All options stay that the questions
   cannot tell from the one with the most exact answers (the paired bootstrap interval of the difference holds 0).
2. Of these, all options stay that cannot be told from the one with the highest log-likelihood of the right answer.
3. The first of these is kept: options are in order of preference, cheaper and simpler ones first.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import Config, GenerateConfig
from m3runtime.errors import CodecError, ConfigError
from m3runtime.lab.evaluation.journal import Journal, silent
from m3runtime.lab.evaluation.statistics import Estimate, difference
from m3runtime.lab.evaluation.trials import Trial, TrialMode, Trials, changed
from m3runtime.lab.evaluation.world import make_world
from m3runtime.memory.spec import fingerprint
from m3runtime.writing.writer import OnProgress

Changes = Mapping[str, Any]
COUNTS = (1, 2, 3, 5, 8)
"""Numbers of memories to try."""
TEXT_COUNTS = COUNTS[:-1]
"""Numbers of references to try as text; 8 would tell little more than 5."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Settings of one kind, in order of preference."""

    name: str
    options: tuple[Changes, ...]


@dataclass(frozen=True, slots=True)
class SweepSettings:
    """The settings of ``m3 eval sweep``."""

    seed: int = 1
    references: int = 160
    questions: int = 100
    max_new_tokens: int = 16
    batch: int = 16
    axes: tuple[str, ...] = ()
    """Names of the axes to try; empty: all."""
    corpus: tuple[str, ...] = ()
    """Files and folders of real text to try chunk lengths on."""

    @property
    def command(self) -> str:
        """The command that has these settings."""
        more = [f"--axis '{name}'" for name in self.axes] + [f"--corpus {path}" for path in self.corpus]
        sizes = f"--seed {self.seed} --references {self.references} --questions {self.questions}"
        return " ".join(["m3 eval sweep", sizes, *more])


@dataclass(frozen=True, slots=True)
class Tried:
    """One option of an axis, tried with the options kept of the axes before."""

    option: Changes
    trial: Trial
    less_exact: Estimate
    """Exact answers of the best option less those of this one, in pairs of questions."""
    less_likely: Estimate
    """Log-likelihood of the best of the options left by rule 1, less that of this one."""
    refused: str = ""
    """Reason why the model does not support the option; the trial is then empty."""


@dataclass(frozen=True, slots=True)
class Walked:
    """An axis with the results of all its options."""

    axis: Axis
    tried: tuple[Tried, ...]
    kept: int


@dataclass(frozen=True, slots=True)
class SweepResults:
    """The results of a sweep."""

    none: Trial
    walked: tuple[Walked, ...]
    kept: dict[str, Any]
    """The recommended values, by dotted key."""
    text: tuple[tuple[int, Trial], ...]
    """Numbers of references, and the trial with so many as text in the prompt, under the recommended settings."""
    fingerprints: dict[str, str]


def axes(layers: int, reference_tokens: int) -> tuple[Axis, ...]:
    """All axes, for a model with ``layers`` layers."""
    tokens: list[Any] = [count for count in (8, 16, 32, 64) if count < reference_tokens]
    half, quarter = layers // 2, layers // 4
    depths: list[Any] = ["first-half", list(range(quarter, layers - quarter)), list(range(half, layers)), "all"]
    return (
        Axis("prompt", _options("generate.prompt", ["question", "reference"])),
        Axis("weights of memories", _options("recall.score_temperature", [None, 0.1, 0.05, 0.03, 0.02])),
        Axis("sinks", _options("memory.sinks", ["once", "each"])),
        Axis("positions", _options("memory.positions", ["parallel", "sequential"])),
        Axis("margin", _options("recall.margin", [None, 0.2, 0.1, 0.05])),
        Axis("score floor", _options("recall.min_score", [0.3, 0.0, 0.5, 0.6])),
        Axis("attention temperature", _options("memory.attention_temperature", [1.0, 0.9, 0.85, 0.8, 0.7])),
        Axis("memories", _options("recall.memories", COUNTS)),
        Axis("tokens per head", _options("memory.tokens_per_head", [*tokens, "all"])),
        Axis("layers", _options("memory.layers", depths)),
        Axis("codec", tuple({"codec": codec} for codec in CODECS)),
    )


CODECS: tuple[dict[str, Any], ...] = (
    {"kind": "product", "bytes": 24},
    {"kind": "product", "bytes": 32},
    {"kind": "product"},
    {"kind": "product", "key_bytes": 32, "value_bytes": 16},
    {"kind": "product", "bytes": 56},
    {"kind": "scalar", "bits": 4},
    {"kind": "scalar", "bits": 8},
    {"kind": "raw"},
)
"""Codecs in order of size, for heads of 64 dimensions."""


_NEVER = Estimate(float("inf"), float("inf"), float("inf"), 0)


def _options(key: str, values: Iterable[Any]) -> tuple[Changes, ...]:
    return tuple({key: value} for value in values)


def choose(trials: Sequence[Trial], seed: int) -> tuple[int, list[Estimate], list[Estimate]]:
    """The place of the option to keep, and the distance of each option to the best, in both measures.

    The measures are exact answers, and log-likelihood among the options left by rule 1. Refused options are empty
    trials.
    """
    able = [index for index, trial in enumerate(trials) if trial.right]
    left, less_exact = _as_good([trial.right for trial in trials], able, seed)
    left, less_likely = _as_good([trial.log_probs for trial in trials], left, seed)
    return left[0], less_exact, less_likely


def _as_good(values: Sequence[Sequence[float]], among: Sequence[int], seed: int) -> tuple[list[int], list[Estimate]]:
    """The rows that cannot be told from the row with the highest sum, and the distance of every row to it."""
    best = max(among, key=lambda index: sum(values[index]))
    behind = [difference(values[best], row, seed) if row else _NEVER for row in values]
    return [index for index in among if index == best or behind[index].low <= 0], behind


class SweepRun:
    """One sweep in one folder. It can be stopped at any moment and run again."""

    def __init__(self, config: Config, settings: SweepSettings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        generate = {"max_new_tokens": settings.max_new_tokens, "stop": ("\n",), "prompt": config.generate.prompt}
        self.config = config.model_copy(update={"generate": GenerateConfig.model_validate(generate)})
        self.world = make_world(
            settings.seed, references=settings.references, questions=settings.questions, unanswerable=0
        )

    def run(self, adapter: Adapter, progress: OnProgress = silent) -> SweepResults:
        """Try all axes. ``progress`` is called with an axis or a part of a trial, the steps done, and all steps."""
        trials = Trials(self.config, adapter, self.world, batch=self.settings.batch)
        trials.progress = progress
        # The codec is the last axis: until then memories are not quantised.
        kept: dict[str, Any] = {"codec": {"kind": "raw"}}
        walked = []
        with Journal(self.folder / "sweep.jsonl", self._fingerprint(adapter)) as journal:
            none = self._trial(trials, journal, "none", {})
            for axis in self._axes(adapter):
                walked.append(self._walk(trials, journal, axis, kept, progress))
                kept |= walked[-1].axis.options[walked[-1].kept]
            texts = tuple(
                (count, self._trial(trials, journal, "text", {**kept, "recall.memories": count}))
                for count in TEXT_COUNTS
            )
        if all(one.axis.name != "codec" for one in walked):
            del kept["codec"]  # which was not chosen
        prints = {"model": adapter.model_fingerprint, "tokenizer": adapter.tokenizer_fingerprint}
        return SweepResults(none, tuple(walked), kept, texts, prints)

    def _axes(self, adapter: Adapter) -> list[Axis]:
        found = axes(len(adapter.spec.layers), adapter.spec.reference_tokens)
        unknown = set(self.settings.axes) - {axis.name for axis in found}
        if unknown:
            names = ", ".join(axis.name for axis in found)
            raise ConfigError(f"--axis {min(unknown)} is not known; known are {names}")
        return [axis for axis in found if not self.settings.axes or axis.name in self.settings.axes]

    def _walk(self, trials: Trials, journal: Journal, axis: Axis, kept: Changes, progress: OnProgress) -> Walked:
        found, refusals = [], []
        for number, option in enumerate(axis.options):
            progress(f"Trying {axis.name}", number, len(axis.options))
            try:
                found.append(self._trial(trials, journal, "memory", {**kept, **option}))
                refusals.append("")
            except (ConfigError, CodecError) as error:  # this model cannot have it
                found.append(Trial((), (), 0.0, 0.0))
                refusals.append(str(error))
        progress(f"Trying {axis.name}", len(axis.options), len(axis.options))
        kept_one, less_exact, less_likely = choose(found, self.settings.seed)
        tried = tuple(map(Tried, axis.options, found, less_exact, less_likely, refusals))
        return Walked(axis, tried, kept_one)

    def _trial(self, trials: Trials, journal: Journal, mode: TrialMode, changes: Changes) -> Trial:
        config = changed(self.config, changes)
        depends = {
            "memory": config.memory.model_dump(mode="json", exclude={"batch_size"}),
            "recall": config.recall.model_dump(mode="json"),
            "prompt": config.generate.prompt,
            "codec": config.codec.model_dump(mode="json"),
        }
        needed = {"none": ["prompt"], "text": ["recall", "prompt"], "memory": list(depends)}[mode]
        key = fingerprint([mode, {name: depends[name] for name in needed}])
        if key not in journal.done:
            trial = trials.run(mode, changes)
            journal.add({key: [trial.right, trial.log_probs, trial.bytes, trial.recalled]})
        right, log_probs, size, recalled = journal.done[key]
        return Trial(tuple(right), tuple(log_probs), size, recalled)

    def _fingerprint(self, adapter: Adapter) -> str:
        generate = self.config.generate.model_dump(mode="json")
        world = [self.settings.seed, self.settings.references, self.settings.questions, self.settings.batch]
        models = [
            adapter.model_fingerprint,
            adapter.tokenizer_fingerprint,
            self.config.embedder.model_dump(mode="json"),
        ]
        return fingerprint([world, generate, models])
