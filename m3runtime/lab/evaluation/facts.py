"""``m3 eval facts``: questions about invented facts, asked of one model in several modes."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from m3runtime import assembly
from m3runtime.adapters.base import Adapter
from m3runtime.config.schema import Config
from m3runtime.documents.document import Document
from m3runtime.lab.evaluation.asking import AnswersRun, one_line, searched
from m3runtime.lab.evaluation.banks import write_bank
from m3runtime.lab.evaluation.modes import Item
from m3runtime.lab.evaluation.world import Question, make_world
from m3runtime.runtime import Runtime
from m3runtime.writing.writer import OnProgress

Ask = Literal["questions", "statements"]


@dataclass(frozen=True, slots=True)
class FactsSettings:
    """The settings of ``m3 eval facts``."""

    seed: int = 0
    references: int = 320
    questions: int = 200
    unanswerable: int = 50
    ask: Ask = "questions"
    """Questions to answer, or statements to complete."""
    max_new_tokens: int | None = None
    """Most tokens of an answer; None: as the form of the prompt needs."""
    batch: int = 16
    timed: int = 8
    """Questions that are asked again, one at a time, to measure time."""

    @property
    def command(self) -> str:
        """The command that has these settings."""
        of_ask = " --statements" if self.ask == "statements" else ""
        return (
            f"m3 eval facts --seed {self.seed} --references {self.references} --questions {self.questions} "
            f"--unanswerable {self.unanswerable}{of_ask}"
        )


class FactsRun(AnswersRun):
    """One evaluation in one folder, with a bank of its own."""

    def __init__(self, config: Config, settings: FactsSettings, folder: Path) -> None:
        """Raises `InputError` if the references cannot answer so many questions."""
        self.settings = settings
        form = "plain" if settings.ask == "statements" else config.generate.prompt
        super().__init__(
            one_line(config.model_copy(update={"bank": folder / "bank"}), form, settings.max_new_tokens),
            folder / f"answers-{settings.ask}.jsonl",
            batch=settings.batch,
            timed=settings.timed,
        )
        self.world = make_world(
            settings.seed,
            references=settings.references,
            questions=settings.questions,
            unanswerable=settings.unanswerable,
        )

    def prepare(self, adapter: Adapter, progress: OnProgress) -> None:
        """Write the world's references."""
        seed, references = self.world.seed, self.world.references
        documents = [Document(f"world-{seed}:{number}", text) for number, text in enumerate(references)]
        embedder = assembly.open_embedder(self.config)
        try:
            write_bank(self.config, adapter, embedder, documents, progress)
        finally:
            embedder.close()

    def items(self, runtime: Runtime) -> tuple[Item, ...]:
        """The world's questions."""
        ids = runtime.bank.home.find(self.world.references)
        questions = [(f"{number}", one) for number, one in enumerate(self.world.questions)]
        questions += [(f"nowhere-{number}", one) for number, one in enumerate(self.world.unanswerable)]
        asked = [asked_of(question, self.settings.ask) for _, question in questions]
        items = []
        for (key, question), text, (nearest, recalled) in zip(questions, asked, searched(runtime, asked), strict=True):
            right = None if question.reference is None else ids[question.reference]
            items.append(Item(key, question, text, nearest, recalled, right))
        return tuple(items)

    def depends(self) -> Mapping[str, Any]:
        """The settings, but for what is only measured."""
        return {**asdict(self.settings), "timed": 0}


def asked_of(question: Question, ask: Ask) -> str:
    """The text that the model is asked with."""
    return question.text if ask == "questions" else question.statement
