"""``m3 eval sweep``: one setting after the other is tried, and what pays is kept for the next.

The rule, in one place. Axes are gone through in order. On each, every option is tried with what was kept so far.

1. Exact answers are what a user sees, and say little about small differences: the options are left that the questions
   cannot tell from the one of the most exact answers (the paired bootstrap interval of the difference holds 0).
2. Of these, the right answer's log-likelihood decides: the options are left that cannot be told from the best by it.
3. The first of these is kept: options stand in order of preference, the cheaper or simpler before the dearer.
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
"""Numbers of memories that are tried."""
TEXT_COUNTS = COUNTS[:-1]
"""Numbers of references that are tried as text: what 8 of them cost says little that 5 do not."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Settings of one kind, in order of preference."""

    name: str
    options: tuple[Changes, ...]


@dataclass(frozen=True, slots=True)
class SweepSettings:
    """What the settings are tried on."""

    seed: int = 1
    references: int = 160
    questions: int = 100
    max_new_tokens: int = 16
    batch: int = 16


@dataclass(frozen=True, slots=True)
class Tried:
    """One option of an axis, with what was kept of the axes before."""

    option: Changes
    trial: Trial
    less_exact: Estimate
    """How many more exact answers the best option of the axis gives, question by question."""
    less_likely: Estimate
    """How much higher the log-likelihood is of the best of those that have as good exact answers."""
    refused: str = ""
    """Why the model cannot have it; the trial is then empty."""


@dataclass(frozen=True, slots=True)
class Walked:
    """An axis after all of its options were tried."""

    axis: Axis
    tried: tuple[Tried, ...]
    kept: int


@dataclass(frozen=True, slots=True)
class SweepResults:
    """Everything that was found."""

    none: Trial
    walked: tuple[Walked, ...]
    kept: dict[str, Any]
    """The recommended values, by dotted key."""
    text: tuple[tuple[int, Trial], ...]
    """For each number of references, those as text in the prompt, under the recommended rules of recall."""
    fingerprints: dict[str, str]


def axes(layers: int, reference_tokens: int) -> tuple[Axis, ...]:
    """Everything that is varied, for a model of so many layers."""
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
"""In order of bytes, for a head of 64."""


_NEVER = Estimate(float("inf"), float("inf"), float("inf"), 0)


def _options(key: str, values: Iterable[Any]) -> tuple[Changes, ...]:
    return tuple({key: value} for value in values)


def choose(trials: Sequence[Trial], seed: int) -> tuple[int, list[Estimate], list[Estimate]]:
    """Which option is kept, and how far each is behind the best in exact answers, and in log-likelihood.

    The latter is the best of those that have as good exact answers. Refused options are empty trials.
    """
    able = [index for index, trial in enumerate(trials) if trial.right]
    left, less_exact = _as_good([trial.right for trial in trials], able, seed)
    left, less_likely = _as_good([trial.log_probs for trial in trials], left, seed)
    return left[0], less_exact, less_likely


def _as_good(values: Sequence[Sequence[float]], among: Sequence[int], seed: int) -> tuple[list[int], list[Estimate]]:
    """Of some rows of values those that are not told from the highest, and how far every row is behind that."""
    best = max(among, key=lambda index: sum(values[index]))
    behind = [difference(values[best], row, seed) if row else _NEVER for row in values]
    return [index for index in among if index == best or behind[index].low <= 0], behind


class SweepRun:
    """One sweep in one folder. Can be stopped at any moment and run again."""

    def __init__(self, config: Config, settings: SweepSettings, folder: Path, only: Sequence[str] = ()) -> None:
        """``only`` names the axes to go through; empty: all."""
        self.settings = settings
        self.folder = folder
        self.only = tuple(only)
        generate = {"max_new_tokens": settings.max_new_tokens, "stop": ("\n",), "prompt": config.generate.prompt}
        self.config = config.model_copy(update={"generate": GenerateConfig.model_validate(generate)})
        self.world = make_world(
            settings.seed, references=settings.references, questions=settings.questions, unanswerable=0
        )

    def run(self, adapter: Adapter, progress: OnProgress = silent) -> SweepResults:
        """Go through the axes. ``progress`` is called with an axis (or a part of a trial), what is done, and all."""
        trials = Trials(self.config, adapter, self.world, batch=self.settings.batch)
        trials.progress = progress
        # Codecs come last: until then memories are read as they are.
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
        unknown = set(self.only) - {axis.name for axis in found}
        if unknown:
            names = ", ".join(axis.name for axis in found)
            raise ConfigError(f"--axis {min(unknown)} is not known; there are {names}")
        return [axis for axis in found if not self.only or axis.name in self.only]

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
