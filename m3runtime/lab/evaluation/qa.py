"""``m3 eval qa``: a user's own questions, asked of one model in several modes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import Any

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import Config
from m3runtime.documents.document import Document
from m3runtime.errors import InputError
from m3runtime.lab.evaluation.asking import AnswersRun, one_line, searched
from m3runtime.lab.evaluation.banks import write_bank
from m3runtime.lab.evaluation.judging import is_right
from m3runtime.lab.evaluation.modes import Item
from m3runtime.lab.evaluation.question_files import Asked, Text, read_questions
from m3runtime.lab.evaluation.world import Question
from m3runtime.memory.block import as_ids
from m3runtime.memory.spec import fingerprint
from m3runtime.runtime import Runtime
from m3runtime.writing.writer import OnProgress


@dataclass(frozen=True, slots=True)
class QaSettings:
    """The settings of ``m3 eval qa``."""

    file: str
    """The file of questions."""
    seed: int = 0
    most: int = 200
    """Most questions that are drawn."""
    texts: int | None = None
    """Texts of the file that a bank of its own has: those that answer a drawn question, and others up to so many in
    all. None: the configured bank is asked."""
    batch: int = 16
    timed: int = 8
    """Questions that are asked again, one at a time, to measure time."""

    @property
    def command(self) -> str:
        """The command that has these settings."""
        texts = "" if self.texts is None else f" --texts {self.texts}"
        return f"m3 eval qa --questions {self.file} --seed {self.seed} --most {self.most}{texts}"


@dataclass(frozen=True, slots=True)
class Evidence:
    """The memories that could answer a question."""

    holding: frozenset[int]
    """Those of the nearest whose text has an accepted answer."""
    named: tuple[frozenset[int], ...]
    """Those of each text, or source, that the file names for the question."""


class QaRun(AnswersRun):
    """One evaluation in one folder, over the configured bank, or over a bank of the file's own texts."""

    def __init__(self, config: Config, settings: QaSettings, folder: Path) -> None:
        """Draw the questions. Raises `InputError` if the file is none of questions, or they do not fit the settings."""
        own = settings.texts is not None
        config = config.model_copy(update={"bank": folder / "bank"}) if own else config.without_cold_start()
        super().__init__(
            one_line(config, config.generate.prompt),
            folder / "answers.jsonl",
            batch=settings.batch,
            timed=settings.timed,
        )
        self.changes_bank = own
        self.settings = settings
        self.evidence: dict[str, Evidence] = {}
        self._nearest: list[list[int]] = []
        every = read_questions(Path(settings.file))
        drawn = sorted(Random(settings.seed).sample(range(len(every)), min(settings.most, len(every))))
        self.questions = {f"{number}": every[number] for number in drawn}
        if not any(one.answers for one in self.questions.values()):
            raise InputError(f"{settings.file}: no question has an answer, so nothing can be told")
        self.texts = self._texts(every) if own else {}

    def _texts(self, every: list[Asked]) -> dict[Text, str]:
        """The texts to write, and their names: those of the drawn questions first."""
        drawn = list(self.questions.values())
        needed = dict.fromkeys(text for one in drawn for text in one.right)
        others = dict.fromkeys(text for one in (*drawn, *every) for text in (*one.right, *one.others))
        if not others:
            raise InputError(
                f"{self.settings.file}: the questions come without texts; leave out --texts to ask the configured bank"
            )
        free = [text for text in others if text not in needed]
        chosen = [*needed, *free[: max(0, (self.settings.texts or 0) - len(needed))]]
        name = Path(self.settings.file).name
        return {text: f"{name}:{number}" for number, text in enumerate(chosen)}

    def prepare(self, adapter: Adapter, progress: OnProgress) -> None:
        """Write the file's texts, if they have a bank of their own."""
        if not self.changes_bank:
            return
        embedder = assembly.open_embedder(self.config)
        try:
            documents = [Document(name, text.headed) for text, name in self.texts.items()]
            write_bank(self.config, adapter, embedder, documents, progress, whole=False)
        finally:
            embedder.close()

    def items(self, runtime: Runtime) -> tuple[Item, ...]:
        """The drawn questions. Raises `InputError` for a source that the bank does not have."""
        asked = [one.question for one in self.questions.values()]
        if not self.changes_bank:
            self._check_sources(runtime)
        items: list[Item] = []
        for (key, one), (nearest, recalled) in zip(self.questions.items(), searched(runtime, asked), strict=True):
            named = self._named(runtime, one)
            texts = self._texts_of(
                runtime, {match.id for match in (*nearest, *recalled)} | {id for some in named for id in some}
            )
            holding = frozenset(id for id, text in texts.items() if is_right(text, one.answers))
            # Of those that the file names and that have the answer, the nearest one.
            order = list(dict.fromkeys(match.id for match in (*nearest, *recalled)))
            right = sorted(
                (id for some in named for id in some & holding),
                key=lambda id: (order.index(id) if id in order else len(order), id),
            )
            self.evidence[key] = Evidence(holding & set(order), named)
            question = Question(one.question, one.question, one.answers, None, (), "question")
            items.append(Item(key, question, one.question, nearest, recalled, right[0] if right else None))
        self._nearest = [[match.id for match in item.nearest] for item in items]
        return tuple(items)

    def depends(self) -> Mapping[str, Any]:
        """The questions, and what was found for them in a bank that may change."""
        questions = {key: asdict(one) for key, one in self.questions.items()}
        return {"questions": fingerprint(questions), "nearest": fingerprint(self._nearest), "batch": self.batch}

    def _check_sources(self, runtime: Runtime) -> None:
        known = runtime.bank.home.sources().keys()
        for one in self.questions.values():
            for source in one.sources:
                if source not in known:
                    raise InputError(f"{one.where}: the bank {runtime.bank.path} has no source {source!r}")

    def _named(self, runtime: Runtime, one: Asked) -> tuple[frozenset[int], ...]:
        home = runtime.bank.home
        if self.changes_bank:
            return tuple(frozenset(map(int, home.ids_of(self.texts[text]))) for text in one.right)
        return tuple(frozenset(map(int, home.ids_of(source))) for source in one.sources)

    def _texts_of(self, runtime: Runtime, ids: set[int]) -> dict[int, str]:
        wanted = sorted(ids)
        found = runtime.bank.home.references(as_ids(wanted))
        return {id: one.headed for id, one in zip(wanted, found, strict=True) if one is not None}
