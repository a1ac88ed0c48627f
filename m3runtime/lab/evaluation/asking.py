"""`AnswersRun`: one model is asked the same questions in several modes. A run that was stopped resumes."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from m3runtime.adapters.answers import Form
from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import Config, GenerateConfig
from m3runtime.lab.evaluation.facts_grounding import grounded
from m3runtime.lab.evaluation.journal import Journal, silent
from m3runtime.lab.evaluation.judging import is_invented, is_right
from m3runtime.lab.evaluation.modes import MODES, NEAREST, NEEDS_ANSWER, SEARCHING, Asker, Item, Mode
from m3runtime.memory.block import as_ids
from m3runtime.memory.spec import fingerprint
from m3runtime.observe.counts import TierStats
from m3runtime.retrieval.match import Match
from m3runtime.runtime import Runtime
from m3runtime.writing.writer import OnProgress


@dataclass(frozen=True, slots=True)
class Timing:
    """The time of one question, asked alone in one mode."""

    mode: Mode
    first_token_s: float
    """Seconds from the question to the first token, with search."""
    tokens_per_s: float
    bytes: dict[str, int]
    """Bytes read from each tier, by its name."""


@dataclass(frozen=True, slots=True)
class AnswersResults:
    """The results of an `AnswersRun`."""

    items: tuple[Item, ...]
    """Answerable and unanswerable ones."""
    answers: dict[Mode, dict[str, dict[str, Any]]]
    """By mode and key of the item: ``text``, ``right``, ``invented``, ``log_probs`` of the right answer's tokens."""
    timings: tuple[Timing, ...]
    fingerprints: dict[str, str]
    """Fingerprints of everything that the bank was made with, by name."""


def one_line(config: Config, form: Form, most: int | None = None) -> Config:
    """The configuration in which every mode decodes alike: greedily, one line of at most so many tokens."""
    most = most or (40 if form == "chat" else 16)  # in a chat models answer in whole sentences
    generate: dict[str, Any] = {"max_new_tokens": most, "prompt": form, "stop": ("\n",), "temperature": 0.0}
    generate |= {"grounding": True, "log_probs": 0, "grounding_floor": config.generate.grounding_floor}
    return config.model_copy(update={"generate": GenerateConfig.model_validate(generate)})


class AnswersRun(ABC):
    """One evaluation in one folder, with its journal. It can be stopped at any moment and run again."""

    changes_bank = True
    """False: the bank is a user's, and is opened for reading alone."""

    def __init__(self, config: Config, journal: Path, *, batch: int, timed: int) -> None:
        """``timed`` questions are asked again, one at a time, to measure time."""
        self.config = config
        self.journal = journal
        self.batch = batch
        self.timed = timed
        self.modes: tuple[Mode, ...] = ()

    @abstractmethod
    def prepare(self, adapter: Adapter, progress: OnProgress) -> None:
        """Write the bank, or check it, before it is opened."""

    @abstractmethod
    def items(self, runtime: Runtime) -> tuple[Item, ...]:
        """The questions, and the memories that are found for them."""

    @abstractmethod
    def depends(self) -> Mapping[str, Any]:
        """The settings that answers depend on, as JSON values."""

    def run(self, adapter: Adapter, progress: OnProgress = silent, modes: Iterable[Mode] = MODES) -> AnswersResults:
        """Ask all questions in all modes that they can be asked in, and measure times. A stopped run resumes.

        ``progress`` is called with the title of a task (a mode, for one), the steps done, and all
        steps of the task.
        """
        self.prepare(adapter, progress)
        with self._open(adapter) as runtime:
            items = self.items(runtime)
            self.modes = modes = tuple(mode for mode in modes if _asked(mode, items))
            asker = asker_of(adapter, runtime, items)
            with Journal(self.journal, self._fingerprint(runtime)) as journal:
                for mode in modes:
                    self._ask_all(asker, mode, items, journal, progress)
                done = dict(journal.done)
        answers = {mode: {item.key: done[f"{mode}/{item.key}"] for item in _asked(mode, items)} for mode in modes}
        with self._open(adapter) as runtime:  # anew: its tiers are cold
            timings = self._time(asker_of(adapter, runtime, items), modes, items, progress)
            return AnswersResults(items, answers, timings, runtime.bank.manifest.fingerprints())

    def _open(self, adapter: Adapter) -> Runtime:
        return Runtime.open(self.config, encoder=adapter, read_only=not self.changes_bank)

    def _ask_all(self, asker: Asker, mode: Mode, items: Sequence[Item], journal: Journal, progress: OnProgress) -> None:
        all_asked = _asked(mode, items)
        journal.add(self._known(asker, mode, all_asked, journal))
        # Items of similar length share a batch, so that little is padded.
        asked = sorted(
            (item for item in all_asked if not self._twin(asker, mode, item)),
            key=lambda item: (asker.length(mode, item), item.key),
        )
        journal.fill(
            asked,
            self.batch,
            lambda item: f"{mode}/{item.key}",
            lambda batch: ask(asker, mode, batch, self.config.generate),
            partial(progress, mode),
        )

    def _known(self, asker: Asker, mode: Mode, items: Sequence[Item], journal: Journal) -> dict[str, Any]:
        """Answers known from another mode, which gave the model the same references in the same prompt."""
        twins = {item.key: self._twin(asker, mode, item) for item in items}
        return {
            f"{mode}/{key}": journal.done[f"{twin}/{key}"]
            for key, twin in twins.items()
            if twin and f"{mode}/{key}" not in journal.done
        }

    def _twin(self, asker: Asker, mode: Mode, item: Item) -> Mode | None:
        """An earlier mode whose prompt is the same, or None."""
        if asker.texts(mode, item) is None:
            return None
        earlier = self.modes[: self.modes.index(mode)]
        return next((twin for twin in earlier if asker.texts(twin, item) == asker.texts(mode, item)), None)

    def _time(
        self, asker: Asker, modes: Sequence[Mode], items: Sequence[Item], progress: OnProgress
    ) -> tuple[Timing, ...]:
        """Time questions one by one; the modes take turns, so that changes of the machine's load affect all alike."""
        chosen = [item for item in items if all(item in _asked(mode, [item]) for mode in modes)][: self.timed]
        timings = []
        for number, item in enumerate(chosen):
            progress("Measuring times", number, len(chosen))
            timings += [time_one(asker, mode, item, self.config.generate) for mode in modes]
        progress("Measuring times", len(chosen), len(chosen))
        return tuple(timings)

    def _fingerprint(self, runtime: Runtime) -> str:
        """A fingerprint of everything that the answers depend on."""
        depends = self.config.model_dump(mode="json", exclude={"bank", "tiers", "index"})
        return fingerprint([depends, self.depends(), runtime.bank.stamp.bank, runtime.bank.manifest.embedder])


def searched(runtime: Runtime, texts: Sequence[str]) -> list[tuple[tuple[Match, ...], tuple[Match, ...]]]:
    """For each text the nearest memories, and those of them that a recall would choose."""
    nearest = runtime.search(texts, max(NEAREST, runtime.config.recall.memories))
    return [(tuple(near), tuple(chosen)) for near, chosen in zip(nearest, runtime.search(texts), strict=True)]


def asker_of(adapter: Adapter, runtime: Runtime, items: Iterable[Item]) -> Asker:
    """An `Asker` with every reference that the items name."""
    wanted = {match.id for item in items for match in (*item.nearest, *item.recalled)} | {
        item.right for item in items if item.right is not None
    }
    ids = sorted(wanted)
    references = {
        id: one for id, one in zip(ids, runtime.bank.home.references(as_ids(ids)), strict=True) if one is not None
    }
    return Asker(adapter, runtime, references, runtime.config.generate.prompt)


def ask(asker: Asker, mode: Mode, items: Sequence[Item], settings: GenerateConfig) -> list[dict[str, Any]]:
    """Ask the model; the records have its answers, and the log-likelihood of the right ones."""
    continuations = [f" {item.question.answers[0]}" if item.question.answers else None for item in items]
    with asker.ready(mode, items) as (prompts, streams):
        examined = asker.adapter.examine(prompts, continuations, streams, settings)
    records = []
    for item, (answer, score) in zip(items, examined, strict=True):
        record: dict[str, Any] = {"text": answer.text, "recalled": [list(chunk.ids) for chunk in answer.chunks]}
        record |= grounded(answer)
        if score is None:
            record["invented"] = is_invented(answer.text)
        else:
            record |= {"right": is_right(answer.text, item.question.answers), "log_probs": list(score.log_probs)}
        records.append(record)
    return records


def time_one(asker: Asker, mode: Mode, item: Item, settings: GenerateConfig) -> Timing:
    """Ask for one item as a user would; the time includes search, in every mode that searches."""
    before = asker.runtime.hierarchy.stats()
    began = perf_counter()
    if mode in SEARCHING:
        asker.runtime.search([item.asked])
    with asker.ready(mode, [item]) as (prompts, streams):
        searched = perf_counter() - began
        (answer,) = asker.adapter.generate(prompts, streams, settings)
    return Timing(mode, searched + answer.first_token_s, answer.tokens_per_s, _read(before, asker.runtime))


def _read(before: Sequence[TierStats], runtime: Runtime) -> dict[str, int]:
    return {now.name: now.bytes - then.bytes for then, now in zip(before, runtime.hierarchy.stats(), strict=True)}


def _asked(mode: Mode, items: Sequence[Item]) -> list[Item]:
    return [item for item in items if item.right is not None or mode not in NEEDS_ANSWER]
